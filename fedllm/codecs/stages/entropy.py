"""Coders: integer codes to bytes, lossless.

Measured on codes of N(0, 1) (docs/codecs.md): ANS stays within 2 % of the entropy at any rate, zstandard 1 %
to 70 % above it; so ANS it is, although zstandard is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedllm.codecs.base import Buffer, Reader
from fedllm.codecs.stages import ans
from fedllm.codecs.stages.bits import Codes, pack_codes, packed_bytes, unpack_codes
from fedllm.errors import CodecError

__all__ = ["Entropy", "Packed"]


@dataclass(frozen=True)
class Packed:
    """The coder that goes without saying: every code takes the bits its alphabet needs."""

    def encode(self, codes: Codes, alphabet: int) -> Sequence[Buffer]:
        """Return packed codes."""
        return [pack_codes(codes, _width(alphabet))]

    def decode(self, reader: Reader, count: int, alphabet: int) -> Codes:
        """Return ``count`` codes."""
        bits = _width(alphabet)
        return unpack_codes(reader.take(packed_bytes(count, bits), "codes"), count, bits)


@dataclass(frozen=True)
class Entropy:
    """``entropy``: asymmetric numeral systems (Duda 2009) with the codes' own frequencies; at most packed.

    The frequencies travel as one byte per symbol: its cost in eighths of a bit.
    """

    name = "entropy"
    example = "quantize(bits=4) | entropy"
    rate = "entropy of the codes"
    cost = "O(n), about 30 million codes a second"
    kind = "coder"

    def encode(self, codes: Codes, alphabet: int) -> Sequence[Buffer]:
        """Return one byte that says how codes are coded, and the codes."""
        packed = packed_bytes(codes.size, _width(alphabet))
        costs = _costs(np.bincount(codes, minlength=alphabet))
        if alphabet + 4 < packed:
            words = ans.encode(codes, _frequencies(costs))
            if costs.nbytes + 4 + words.nbytes < packed:
                return [b"\1", costs.data, len(words).to_bytes(4, "little"), words.data]
        return [b"\0", *Packed().encode(codes, alphabet)]

    def decode(self, reader: Reader, count: int, alphabet: int) -> Codes:
        """Return ``count`` codes."""
        if not reader.take(1, "codes")[0]:
            return Packed().decode(reader, count, alphabet)
        costs = np.frombuffer(reader.take(alphabet, "frequencies"), np.uint8)
        words = np.frombuffer(reader.take(2 * reader.number("codes"), "codes"), "<u2")
        try:
            return ans.decode(words, _frequencies(costs), count)
        except ValueError as error:
            raise CodecError(f"payload has entropy-coded data that no encoder writes: {error}") from error


STAGES = (Entropy,)


def _width(alphabet: int) -> int:
    return (alphabet - 1).bit_length()


_EIGHTHS = np.array([round(2 ** (31 - step / 8)) for step in range(8)], np.int64)


def _costs(counts: npt.NDArray[np.int64]) -> Codes:
    """Return -8 log2 of every symbol's frequency, rounded; 255 where it does not occur."""
    shares = np.maximum(counts, 1e-9) / max(1, counts.sum())
    costs: npt.NDArray[np.float64] = np.clip(np.rint(-8 * np.log2(shares)), 0, 255)
    return costs.astype(np.uint8)


def _frequencies(costs: Codes) -> npt.NDArray[np.uint32]:
    """Return frequencies for ANS, in integers, so that every machine has the same; raises ``ValueError``."""
    occurs = costs < 255
    if not occurs.any():
        raise ValueError("no symbol occurs")
    weights = np.where(occurs, np.maximum(_EIGHTHS[costs & 7] >> (costs >> 3).astype(np.int64), 1), 0)
    total = 1 << ans.PRECISION
    frequencies = np.where(occurs, 1 + weights * (total - costs.size) // weights.sum(), 0)
    frequencies[frequencies.argmax()] += total - frequencies.sum()
    return frequencies.astype(np.uint32)
