"""Integers modulo 2^bits: how masks are drawn, and how masked values travel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedllm.codecs.stages.bits import pack_codes, packed_bytes, unpack_codes
from fedllm.errors import WireError

__all__ = ["Words", "mask", "pack", "packed_size", "reduced", "signed", "unpack", "words_of"]

Words = npt.NDArray[np.unsignedinteger]
"""Unsigned integers of the least width that holds ``bits``, all below 2^bits."""


def words_of(values: npt.NDArray[np.int64], bits: int) -> Words:
    """Return integers modulo 2^bits.

    >>> words_of(np.array([-1, 5]), 3).tolist()
    [7, 5]
    """
    return reduced(values.astype(_width(bits)), bits)


def signed(words: Words, bits: int) -> npt.NDArray[np.int64]:
    """Return those representatives that lie in [-2^(bits - 1), 2^(bits - 1)).

    >>> signed(np.array([7, 5, 3], np.uint8), 3).tolist()
    [-1, -3, 3]
    """
    shift = np.uint64(64 - bits)
    return (words.astype(np.uint64) << shift).view(np.int64) >> shift.astype(np.int64)


def reduced(words: Words, bits: int) -> Words:
    """Reduce sums modulo 2^bits, in place; they have wrapped around at the end of their width already."""
    if bits < 8 * words.itemsize:
        words &= words.dtype.type((1 << bits) - 1)
    return words


def mask(key: bytes, count: int, bits: int) -> Words:
    """Return ``count`` integers modulo 2^bits that are a ChaCha20 key stream (RFC 8439).

    Args:
        key: 32 bytes, which make one stream only: the nonce is zero.
        count: of integers.
        bits: of each.
    """
    width = _width(bits)
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    stream = cipher.update(bytes(count * width.itemsize))
    return reduced(np.frombuffer(bytearray(stream), width), bits)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` integers take.

    >>> packed_size(800, 11)
    1100
    """
    whole, rest = divmod(bits, 8)
    return count * whole + (packed_bytes(count, rest) if rest else 0)


def pack(words: Words, bits: int) -> bytes:
    """Write integers, the lowest byte of all of them first."""
    whole, rest = divmod(bits, 8)
    planes = np.ascontiguousarray(_planes(words).T)
    parts: list[bytes | memoryview] = [planes[:whole].tobytes()]
    if rest:
        parts.append(pack_codes(planes[whole], rest))
    return b"".join(parts)


def unpack(data: bytes, count: int, bits: int) -> Words:
    """Invert :func:`pack`.

    Raises:
        WireError: it is not as long as that many integers are.

    >>> unpack(pack(words_of(np.arange(-3, 4), 11), 11), 7, 11).tolist()
    [2045, 2046, 2047, 0, 1, 2, 3]
    """
    if len(data) != packed_size(count, bits):
        raise WireError(f"{count} masked values are {packed_size(count, bits)} bytes, got {len(data)}")
    whole, rest = divmod(bits, 8)
    words = np.zeros(count, _width(bits))
    planes = _planes(words)
    for place in range(whole):
        planes[:, place] = np.frombuffer(data, np.uint8, count, place * count)
    if rest:
        planes[:, whole] = unpack_codes(data[whole * count :], count, rest)
    return words


def _planes(words: Words) -> npt.NDArray[np.uint8]:
    """View integers as their bytes [count, bytes], the lowest first."""
    return words.view(np.uint8).reshape(-1, words.itemsize)


def _width(bits: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype(next(f"<u{size}" for size in (1, 2, 4, 8) if bits <= 8 * size))
