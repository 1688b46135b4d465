"""Random directions that both ends of a link can draw for themselves.

A direction is named by (seed, round, node, index), never stored and never sent. Its entries come from the
raw words of a Philox counter, so that they are the same on every machine, backend and number of threads:
no floating-point library function takes part.

Directions are drawn one by one (``rademacher``, ``gaussian``) or, ``orthogonal``, without replacement: as
rows of a Hadamard matrix of M = 2^k >= p columns with random signs, whose products v v' have the identity as
their mean. The error of N directions of p entries is then (p - 1)/N (M - N)/(M - 1) times the squared length
of the gradient in place of (p - 1)/N: hardly less while N is small, and none where all M are probed.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedllm.randomness import stream

__all__ = [
    "CHUNK_ENTRIES",
    "Direction",
    "Kind",
    "add_scaled",
    "chunks",
    "combine",
    "flat",
    "gaussian_table",
    "hadamard_rows",
]

Kind = Literal["rademacher", "gaussian", "orthogonal"]

CHUNK_ENTRIES = 1 << 20
"""Entries drawn at a time: 4 MB as float32, and under 16 MB with the words and indices they come from."""

_GRID = 4096
"""Gaussian entries are multiples of 1 / 4096: rounding hides the last bits in which libraries differ."""


@dataclass(frozen=True, order=True, slots=True)
class Direction:
    """The name of one direction: which run, round, client and count within the round."""

    seed: int
    round: int
    node: int
    index: int


@functools.cache
def gaussian_table() -> npt.NDArray[np.float32]:
    """Return 65,536 equally likely values of N(0, 1), mean 0 and mean square 1 to 1e-5.

    Entry i is the quantile at (i + 1/2) / 65,536, scaled to unit variance and rounded to a multiple of
    1 / 4096. The rounding makes the table the same under every ``log`` and ``sqrt`` (a test bounds how close
    any quantile comes to a rounding boundary).
    """
    normal = statistics.NormalDist()
    upper = [normal.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    scale = math.sqrt(math.fsum(q * q for q in upper) / len(upper))
    half = np.array([math.floor(q / scale * _GRID + 0.5) for q in upper], dtype=np.float32) / np.float32(
        _GRID
    )
    return np.concatenate([-half[::-1], half])


def chunks(
    direction: Direction, entries: int, kind: Kind = "rademacher"
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the ``entries`` values of a direction, at most ``CHUNK_ENTRIES`` at a time.

    >>> [c.tolist() for c in chunks(Direction(0, 1, 2, 4), 4)]
    [[1.0, 1.0, -1.0, 1.0]]
    """
    seed, round, row = direction.seed, direction.round, 0
    if kind == "orthogonal":
        row = _row(direction, entries)
        source = stream(seed, "signs", round).bit_generator
    else:
        source = stream(seed, "direction", round, direction.node, direction.index).bit_generator
    per_word = 4 if kind == "gaussian" else 64
    for start in range(0, entries, CHUNK_ENTRIES):
        size = min(CHUNK_ENTRIES, entries - start)
        words = np.asarray(source.random_raw(-(-size // per_word)), dtype="<u8")
        if kind == "gaussian":
            yield gaussian_table()[words.view("<u2")[:size]]
            continue
        bits = np.unpackbits(words.view(np.uint8), count=size, bitorder="little")
        if row:
            bits ^= _odd(np.arange(start, start + size, dtype=np.uint32) & np.uint32(row))
        yield bits.astype(np.float32) * np.float32(2.0) - np.float32(1.0)


def hadamard_rows(entries: int) -> int:
    """Return M, the rows and columns of the matrix that orthogonal directions of so many entries are rows of.

    >>> hadamard_rows(210), hadamard_rows(256)
    (256, 256)
    """
    return 1 << max(entries - 1, 1).bit_length()


def _row(direction: Direction, entries: int) -> int:
    """Return which row of the Hadamard matrix a direction is.

    A client's rows follow one another; clients begin evenly far apart (at their numbers' bits reversed), so
    that 2^i clients with an M/2^i of the rows each take all of them. Where the first begins is drawn anew in
    each round, and so is the order that rows have.
    """
    rows = hadamard_rows(entries)
    bits = rows.bit_length() - 1
    start = int(f"{direction.node % rows:0{bits}b}"[::-1], 2)
    draw = stream(direction.seed, "rows", direction.round)
    step, first = 2 * int(draw.integers(rows // 2)) + 1, int(draw.integers(rows))
    return ((start + direction.index) * step + first) % rows


def _odd(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """Whether each word has an odd number of ones: where its row of the Hadamard matrix is negative."""
    for shift in (16, 8, 4, 2, 1):
        words ^= words >> np.uint32(shift)
    return (words & np.uint32(1)).astype(np.uint8)


def flat(direction: Direction, entries: int, kind: Kind = "rademacher") -> npt.NDArray[np.float32]:
    """Return a whole direction, shape (entries,); for trainable parts that fit in memory many times."""
    out = np.empty(entries, dtype=np.float32)
    start = 0
    for chunk in chunks(direction, entries, kind):
        out[start : start + len(chunk)] = chunk
        start += len(chunk)
    return out


def add_scaled(
    tensors: Mapping[str, torch.Tensor], direction: Direction, scale: float, kind: Kind = "rademacher"
) -> None:
    """Add ``scale`` times a direction to tensors in place; a direction runs through them in name order."""
    pieces = chunks(direction, sum(t.numel() for t in tensors.values()), kind)
    chunk: torch.Tensor = torch.empty(0)
    for name in sorted(tensors):
        target, done = tensors[name].view(-1), 0
        while done < target.numel():
            if not chunk.numel():
                chunk = torch.from_numpy(next(pieces))
            take = min(chunk.numel(), target.numel() - done)
            target[done : done + take].add_(chunk[:take].to(target), alpha=scale)
            chunk, done = chunk[take:], done + take


def combine(
    terms: Mapping[Direction, float], entries: int, kind: Kind = "rademacher"
) -> npt.NDArray[np.float64]:
    """Return the sum of coefficient times direction over all terms, shape (entries,).

    Terms are added one after another in the order of their names, in float64, product and sum rounded
    separately: the same bits on every machine, which a matrix product would not promise.
    """
    total = np.zeros(entries, dtype=np.float64)
    for direction in sorted(terms):
        start = 0
        for chunk in chunks(direction, entries, kind):
            total[start : start + len(chunk)] += np.float64(terms[direction]) * chunk.astype(np.float64)
            start += len(chunk)
    return total
