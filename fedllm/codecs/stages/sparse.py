"""Sparse transforms: send few values and, where the receiver cannot draw them itself, where they belong.

Both treat all rows as one long vector. Positions travel as an Elias-Fano code (Elias, J. ACM 1974): the low
bits of every position packed, the high bits as a unary bitmap, at most 2 + log2(n / k) bits each; from one
value in four on, as a plain bitmap.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from fedllm.codecs.base import CodecContext, Reader
from fedllm.codecs.chain import Array, Rows, Shapes, cut, generator, raw_words
from fedllm.codecs.stages.bits import pack_codes, packed_bytes, unpack_codes
from fedllm.errors import CodecError, ConfigError

__all__ = ["RandomK", "TopK", "index_bytes", "pack_positions", "unpack_positions"]

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TopK:
    """``top_k``: the values of largest magnitude (Aji and Heafield, EMNLP 2017).

    Biased: wrap the chain in ``error_feedback``.

    Attributes:
        fraction: share of values sent, in (0, 1].
    """

    fraction: float

    name = "top_k"
    example = "top_k(fraction=0.01) | quantize(bits=8)"
    rate = "fraction (bits + 2 + log2(1/fraction))"
    cost = "O(n)"
    kind = "transform"
    linear = False
    unbiased = False
    contractive = True

    def __post_init__(self) -> None:
        _require_fraction(self.name, self.fraction)

    def contracted(self) -> Self:
        """Return itself."""
        return self

    def encode(self, rows: Rows, context: CodecContext) -> tuple[Rows, bytes]:
        """Return the values as one row; the side information is their positions."""
        x = _flat(rows)
        count = _count(x.size, self.fraction)
        # Equal magnitudes are all alike to the partition, whose choice among them is a function of x alone.
        chosen = np.argpartition(np.abs(x), x.size - count)[x.size - count :]
        positions = np.sort(chosen).astype(np.int64)
        return [x[positions][None]], pack_positions(positions, x.size)

    def outline(self, shapes: Shapes, reader: Reader, context: CodecContext) -> tuple[Shapes, Positions]:
        """Return the shape of the one row, and the positions."""
        size = _size(shapes)
        count = _count(size, self.fraction)
        return [(1, count)], unpack_positions(reader.take(index_bytes(count, size), "indices"), count, size)

    def decode(self, rows: Rows, plan: Positions, shapes: Shapes, context: CodecContext) -> Rows:
        """Put the values where they belong, zeros elsewhere."""
        return _scatter(rows[0][0], plan, shapes)


@dataclass(frozen=True)
class RandomK:
    """``random_k``: one value, drawn by both sides, out of every run of n / k, times the run's length.

    A stratified form of random sparsification (Konecny et al. 2016): no positions are sent, and none is drawn
    twice. Inside ``error_feedback`` the factor is left out, which makes it a contraction.

    Attributes:
        fraction: share of values sent, in (0, 1].
    """

    fraction: float
    scaled: bool = field(default=True, repr=False)

    name = "random_k"
    example = "random_k(fraction=0.1) | quantize(bits=8, stochastic=true)"
    rate = "fraction bits"
    cost = "O(n)"
    kind = "transform"
    linear = True

    def __post_init__(self) -> None:
        _require_fraction(self.name, self.fraction)

    @property
    def unbiased(self) -> bool:
        """With the factor it is."""
        return self.scaled

    @property
    def contractive(self) -> bool:
        """Without the factor it is."""
        return not self.scaled or self.fraction == 1

    def contracted(self) -> Self:
        """Return the variant without the factor."""
        return replace(self, scaled=False)

    def encode(self, rows: Rows, context: CodecContext) -> tuple[Rows, bytes]:
        """Return the values as one row; there is no side information."""
        x = _flat(rows)
        positions, lengths = self._draw(x.size, context)
        return [(x[positions] * lengths if self.scaled else x[positions])[None]], b""

    def outline(self, shapes: Shapes, reader: Reader, context: CodecContext) -> tuple[Shapes, Positions]:
        """Return the shape of the one row, and the positions."""
        positions, _ = self._draw(_size(shapes), context)
        return [(1, positions.size)], positions

    def decode(self, rows: Rows, plan: Positions, shapes: Shapes, context: CodecContext) -> Rows:
        """Put the values where they belong, zeros elsewhere."""
        return _scatter(rows[0][0], plan, shapes)

    def _draw(self, size: int, context: CodecContext) -> tuple[Positions, Array]:
        """Return one position of every run, and the runs' lengths."""
        count = _count(size, self.fraction)
        starts = np.arange(count + 1) * size // count
        lengths = np.diff(starts)
        draws = raw_words(generator(context, self.name), count) >> np.uint64(32)
        offsets = draws * lengths.astype(np.uint64) >> np.uint64(32)
        return starts[:-1] + offsets.astype(np.int64), lengths.astype(np.float32)


STAGES = (TopK, RandomK)


def index_bytes(count: int, size: int) -> int:
    """Bytes that the positions of ``count`` among ``size`` values take.

    >>> index_bytes(1000, 100_000) * 8 / 1000
    8.568
    """
    if size < 4 * count:
        return -(-size // 8)
    widths, high = _elias_fano(count, size)
    return sum(packed_bytes(count, width) for width in widths) + -(-high // 8)


def pack_positions(positions: Positions, size: int) -> bytes:
    """Pack ascending, different positions below ``size`` into :func:`index_bytes` bytes."""
    if size < 4 * positions.size:
        return _bitmap(positions, size)
    widths, high = _elias_fano(positions.size, size)
    parts = [
        pack_codes((positions >> 8 * index & (1 << width) - 1).astype(np.uint8), width)
        for index, width in enumerate(widths)
    ]
    return b"".join([*parts, _bitmap((positions >> sum(widths)) + np.arange(positions.size), high)])


def unpack_positions(data: memoryview, count: int, size: int) -> Positions:
    """Invert :func:`pack_positions`; positions that are not ascending, too many or too large are an error."""
    if size < 4 * count:
        return _from_bitmap(data, count, size)
    widths, high = _elias_fano(count, size)
    positions = np.zeros(count, np.int64)
    start = 0
    for index, width in enumerate(widths):
        end = start + packed_bytes(count, width)
        positions |= unpack_codes(data[start:end], count, width).astype(np.int64) << 8 * index
        start = end
    positions |= _from_bitmap(data[start:], count, high) - np.arange(count) << sum(widths)
    if positions[-1] >= size or (np.diff(positions) <= 0).any():
        raise CodecError("payload has indices out of order or out of range")
    return positions


def _elias_fano(count: int, size: int) -> tuple[list[int], int]:
    """Return the widths in which the low bits are packed, and the length of the bitmap of the high bits."""
    low = (size // count).bit_length() - 1
    return [min(8, low - start) for start in range(0, low, 8)], count + (size - 1 >> low)


def _bitmap(positions: Positions, size: int) -> bytes:
    bits = np.zeros(size, np.bool_)
    bits[positions] = True
    return np.packbits(bits, bitorder="little").tobytes()


def _from_bitmap(data: memoryview, count: int, size: int) -> Positions:
    positions = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), count=size, bitorder="little"))
    if positions.size != count:
        raise CodecError(f"payload has {positions.size} indices instead of {count}")
    return positions


def _flat(rows: Rows) -> Array:
    return rows[0].reshape(-1) if len(rows) == 1 else np.concatenate([matrix.reshape(-1) for matrix in rows])


def _size(shapes: Shapes) -> int:
    return sum(height * width for height, width in shapes)


def _count(size: int, fraction: float) -> int:
    return max(1, round(fraction * size))


def _scatter(values: Array, positions: Positions, shapes: Shapes) -> Rows:
    x = np.zeros(_size(shapes), np.float32)
    x[positions] = values
    return cut(x, shapes)


def _require_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ConfigError(f"{name} takes fraction above 0 and up to 1, got {fraction:g}")
