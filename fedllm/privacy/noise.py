"""Secret random numbers: ChaCha20 streams (RFC 8439) of keys of 32 bytes, and the noise made of them.

A key names its noise: the same key gives the same, and no key may serve for two different vectors.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

__all__ = ["discrete_gaussian", "gaussian", "uniform"]

_BITS = 52
_PIECE = 2**16
"""Values that are drawn at a time."""


def uniform(key: bytes, count: int) -> npt.NDArray[np.float64]:
    """Return numbers in (0, 1), of 52 bits each.

    >>> bool((uniform(bytes(32), 1000) < 1).all())
    True
    """
    return _unit(_Stream(key).words(count))


def gaussian(key: bytes, count: int) -> torch.Tensor:
    """Return standard normal numbers in float64: the normal quantiles of :func:`uniform`.

    >>> torch.equal(gaussian(bytes(32), 3), gaussian(bytes(32), 4)[:3])
    True
    """
    drawn: torch.Tensor = torch.special.ndtri(torch.from_numpy(uniform(key, count)))
    return drawn


def discrete_gaussian(key: bytes, count: int, deviation: float) -> npt.NDArray[np.int64]:
    """Return integers x, each with probability in proportion to exp(-x^2 / 2 deviation^2).

    By rejection from the discrete Laplace distribution (Canonne, Kamath and Steinke, NeurIPS 2020, algorithms
    2 and 3), whose scale may be any integer: here the power of two next to the deviation. Coins of given
    probabilities are uniform numbers of 52 bits, and so each probability holds to 2^-52.

    Args:
        key: 32 bytes.
        count: of integers.
        deviation: parameter of the distribution, above 0 and below 2^50; from 1 on its standard deviation.

    >>> discrete_gaussian(bytes(32), 5, 2.0).dtype
    dtype('int64')
    """
    stream, found, have = _Stream(key), np.empty(count, dtype=np.int64), 0
    while have < count:
        drawn = _accepted(stream, min(2 * (count - have) + 8, _PIECE), deviation)[: count - have]
        found[have : have + len(drawn)] = drawn
        have += len(drawn)
    return found


def _accepted(stream: _Stream, tries: int, deviation: float) -> npt.NDArray[np.int64]:
    """Return those of so many tries that are kept."""
    bits = max(math.ceil(math.log2(deviation)), 0)
    scale = 2.0**bits
    low = (stream.words(tries) & np.uint64(2**bits - 1)).astype(np.int64)
    kept = _unit(stream.words(tries)) < np.exp(-low / scale)
    high = np.floor(-np.log(_unit(stream.words(tries)))).astype(np.int64)
    size, minus = low + (high << bits), (stream.words(tries) >> np.uint64(63)).astype(bool)
    kept &= ~(minus & (size == 0))
    gap = size - deviation / scale * deviation
    kept &= _unit(stream.words(tries)) < np.exp(-((gap / deviation) ** 2) / 2)
    return np.where(minus, -size, size)[kept]


class _Stream:
    """A key's words of 64 bits, one after another."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")


def _unit(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    return ((words >> np.uint64(64 - _BITS)).astype(np.float64) + 0.5) * 2.0**-_BITS
