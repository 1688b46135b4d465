"""Asymmetric numeral systems (Duda 2009), as many independent lanes as make numpy's loops worth their start.

A lane is rANS with a state in [2**16, 2**32) and 16-bit words. Symbol i belongs to lane i mod L, so that one
step of all lanes is a handful of array operations; the lanes share one stream of words, in the order in which
decoding takes them. Integers throughout: every machine writes and reads the same bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedllm.codecs.stages.bits import Codes

__all__ = ["PRECISION", "decode", "encode"]

PRECISION = 14
"""Frequencies add up to 2**14."""

Words = npt.NDArray[np.uint16]
Frequencies = npt.NDArray[np.uint32]

_LOW = np.uint32(1 << 16)
_WORD = np.uint32(16)
_SHIFT = np.uint32(PRECISION)
_STEPS, _MOST_LANES = 2048, 512
"""Symbols of a lane at least, and lanes at most: a lane costs three bytes, a step of all microseconds."""
_ROWS = 256
"""Steps for which tables are looked up at a time."""


def encode(codes: Codes, frequencies: Frequencies) -> Words:
    """Return the words of codes [n], two per lane of final states first.

    Args:
        codes: integers in [0, len(frequencies)), each of a frequency above 0.
        frequencies: per symbol, adding up to ``2 ** PRECISION``.

    >>> codes = np.array([0, 1, 0, 0, 2] * 40, np.uint8)
    >>> frequencies = np.array([9830, 3277, 3277], np.uint32)
    >>> words = encode(codes, frequencies)
    >>> words.nbytes, bool((decode(words, frequencies, 200) == codes).all())
    (38, True)
    """
    lanes = _lanes(codes.size)
    starts = _starts(frequencies)
    state = np.full(lanes, _LOW, np.uint32)
    taken: list[Words] = []
    for top in reversed(range(0, codes.size, _ROWS * lanes)):
        part = codes[top : top + _ROWS * lanes]
        sizes, offsets = frequencies[part], starts[part]
        # Beyond these a state would leave its range; at a frequency of 2**PRECISION none does: 2**32 wraps.
        limits = (sizes << np.uint32(32 - PRECISION)) - np.uint32(1)
        for first in reversed(range(0, part.size, lanes)):
            step = slice(first, first + lanes)
            size = sizes[step]
            x = state[: size.size]
            full = x > limits[step]
            taken.append(x[full].astype(np.uint16))
            np.right_shift(x, _WORD, out=x, where=full)
            quotient = x // size
            x += quotient * ((np.uint32(1) << _SHIFT) - size) + offsets[step]
    states = state.astype("<u4").view("<u2")
    return np.concatenate([states, *reversed(taken)]).astype("<u2", copy=False)


def decode(words: Words, frequencies: Frequencies, count: int) -> Codes:
    """Invert :func:`encode`; raises ``ValueError`` for words that it would not write."""
    lanes = _lanes(count)
    if words.size < 2 * lanes:
        raise ValueError("states are missing")
    symbols = np.repeat(np.arange(frequencies.size, dtype=np.uint8), frequencies)
    sizes = frequencies[symbols]
    offsets = np.arange(1 << PRECISION, dtype=np.uint32) - _starts(frequencies)[symbols]
    state = words[: 2 * lanes].view("<u4").astype(np.uint32)
    rest = words[2 * lanes :].astype(np.uint32)
    codes = np.empty(count, np.uint8)
    read = 0
    for first in range(0, count, lanes):
        step = codes[first : first + lanes]
        x = state[: step.size]
        slot = x & np.uint32((1 << PRECISION) - 1)
        np.take(symbols, slot, out=step)
        x >>= _SHIFT
        x *= sizes[slot]
        x += offsets[slot]
        (empty,) = np.nonzero(x < _LOW)
        following = rest[read : read + empty.size]
        if following.size < empty.size:
            raise ValueError("words are missing")
        x[empty] = (x[empty] << _WORD) | following
        read += empty.size
    if read < rest.size or (state != _LOW).any():
        raise ValueError("words are left over")
    return codes


def _lanes(count: int) -> int:
    return min(max(1, count // _STEPS), _MOST_LANES)


def _starts(frequencies: Frequencies) -> Frequencies:
    """Return the sum of the frequencies before each symbol."""
    starts: Frequencies = np.cumsum(frequencies, dtype=np.uint32) - frequencies
    return starts
