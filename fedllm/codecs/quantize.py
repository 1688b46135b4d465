"""Quantizers: rows of floats to integer codes, with one float32 scale for every block of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt

from fedllm.codecs.base import Buffer, CodecContext, Reader
from fedllm.codecs.bits import Codes
from fedllm.codecs.chain import Array, Coder, Rows, Shapes, generator, raw_words
from fedllm.errors import CodecError, ConfigError

__all__ = ["BlockQuantizer", "Float32", "Quantize", "Sign", "blocks", "chunks", "dither", "floats"]

CHUNK = 1 << 15
"""Values that go through all steps of a quantizer at once: 128 KiB of floats, so that they stay in cache."""

TINY = np.float32(1e-30)
"""Blocks whose largest magnitude is below are zero: their steps would not be normal floats."""


LARGE = 1e35
"""Scales from here on are refused: a decoded value could overflow float32."""

TOO_LARGE = "cannot encode values so large that decoding could overflow float32"


@dataclass(frozen=True)
class Float32:
    """The quantizer that goes without saying: four bytes a value, exact."""

    linear = True
    unbiased = True
    contractive = True

    def contracted(self) -> Float32:
        """Return itself."""
        return self

    def encode(self, rows: Rows, coder: Coder, context: CodecContext) -> Sequence[Buffer]:
        """Return raw values."""
        if not all(np.isfinite(matrix).all() for matrix in rows):
            raise CodecError(TOO_LARGE)
        return [matrix.tobytes() for matrix in rows]

    def decode(self, reader: Reader, shapes: Shapes, coder: Coder, context: CodecContext) -> Rows:
        """Return the values."""
        return [
            floats(reader, height * width, "values").reshape(height, width).copy() for height, width in shapes
        ]


class BlockQuantizer(ABC):
    """A quantizer that treats blocks one by one: a scale and as many codes as values.

    Attributes:
        bits: width of a code, 1 to 8; of a fraction f, that share of the blocks has one bit more.
        block: values that share a scale.
    """

    bits: float
    block: int
    kind = "quantizer"
    linear = False

    @abstractmethod
    def quantize(self, x: Array, bits: int, random: np.random.Generator, out: Codes, scratch: Array) -> Array:
        """Write the codes of blocks ``x`` [n, d] to ``out`` [n, d] and return their scales [n].

        ``scratch`` [n, d] is free to use: memory just touched is many times faster than fresh memory.
        """

    @abstractmethod
    def dequantize(self, codes: Codes, bits: int, scales: Array, out: Array) -> None:
        """Write the values of ``codes`` [n, d] under ``scales`` [n, 1] to ``out`` [n, d]."""

    def contracted(self) -> Self:
        """Return itself."""
        return self

    def encode(self, rows: Rows, coder: Coder, context: CodecContext) -> Sequence[Buffer]:
        """Return all scales, then the codes of each rate."""
        matrices = [part for matrix in rows for part in blocks(matrix, self.block)]
        random = generator(context, "quantize")
        scales: list[Array] = []
        coded: list[Buffer] = []
        for bits, places in _rates([len(x) for x in matrices], self.bits):
            inputs = [matrices[index][selected] for index, selected in places]
            codes = np.empty(sum(x.size for x in inputs), np.uint8)
            for x, out in zip(inputs, _split(codes, inputs), strict=True):
                scratch = np.empty((min(len(x), rows_of_chunk(x)), x.shape[1]), np.float32)
                scales.extend(
                    self.quantize(x[part], bits, random, out[part], scratch[: len(x[part])])
                    for part in chunks(x)
                )
            coded.extend(coder.encode(codes, 1 << bits))
        joined = np.concatenate(scales)
        if not (joined < LARGE).all():
            raise CodecError(TOO_LARGE)
        return [joined.tobytes(), *coded]

    def decode(self, reader: Reader, shapes: Shapes, coder: Coder, context: CodecContext) -> Rows:
        """Return rows of values that the grid has."""
        rows: Rows = [np.empty(shape, np.float32) for shape in shapes]
        matrices = [part for matrix in rows for part in blocks(matrix, self.block)]
        scales = floats(reader, sum(len(x) for x in matrices), "scales")
        for bits, places in _rates([len(x) for x in matrices], self.bits):
            outputs = [matrices[index][selected] for index, selected in places]
            codes = coder.decode(reader, sum(x.size for x in outputs), 1 << bits)
            for (index, selected), part, out in zip(places, _split(codes, outputs), outputs, strict=True):
                own, scales = scales[: len(out), None], scales[len(out) :]
                for chunk in chunks(out):
                    self.dequantize(part[chunk], bits, own[chunk], out[chunk])
                if not isinstance(selected, slice):
                    matrices[index][selected] = out
        return rows


@dataclass(frozen=True)
class Quantize(BlockQuantizer):
    """``quantize``: a uniform grid of ``2**bits - 1`` levels with zero among them (two levels at one bit).

    A code is ``x / step`` rounded, to the nearest integer or - ``stochastic``, QSGD (Alistarh et al., NeurIPS
    2017, section 3.1) - up or down at random such that the expectation is ``x``. ``step`` is the block's
    largest magnitude over ``2**(bits-1) - 1``. At one bit a value becomes plus or minus the block's mean
    magnitude, or its largest if stochastic. Right after ``rotate``, see :class:`fedllm.codecs.rotate.Eden`.

    Attributes:
        bits: 1 to 8; a fraction gives that share of the blocks one bit more than the others.
        block: values that share a scale, at least 8; costs 32 / block bits a value.
        stochastic: unbiased, at about twice the mean squared error.
    """

    bits: float
    block: int = 4096
    stochastic: bool = False

    name = "quantize"
    example = "quantize(bits=4)"
    rate = "bits + 32/block"
    cost = "O(n)"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"quantize takes bits from 1 to 8, got {self.bits:g}")
        require_block("quantize", self.block)

    @property
    def unbiased(self) -> bool:
        """Only rounding at random is."""
        return self.stochastic

    @property
    def contractive(self) -> bool:
        """Rounding to the nearest is; at random the variance of a whole block must stay below its energy."""
        return not self.stochastic or self.block < 4 * _half(int(self.bits)) ** 2

    def quantize(self, x: Array, bits: int, random: np.random.Generator, out: Codes, scratch: Array) -> Array:
        """See :meth:`BlockQuantizer.quantize`."""
        if bits == 1 and not self.stochastic:
            return signs(x, out, scratch)
        half = np.float32(_half(bits))
        y = np.abs(x, out=scratch)
        largest = y.max(axis=1)
        np.multiply(x, half * inverse(largest)[:, None], out=y)
        if bits < 8:
            y += half
        if self.stochastic:
            y += dither(random, x.shape)
            np.floor(y, out=y)
            np.minimum(y, half if bits == 8 else 2 * half, out=y)
        else:
            np.rint(y, out=y)
        np.copyto(out.view(np.int8) if bits == 8 else out, y, casting="unsafe")
        steps: Array = largest / half
        return steps

    def dequantize(self, codes: Codes, bits: int, scales: Array, out: Array) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        if bits == 8:  # signed as they are, which saves a pass
            np.copyto(out, codes.view(np.int8))
        else:
            np.copyto(out, codes)
            out -= np.float32(_half(bits))
        out *= scales


@dataclass(frozen=True)
class Sign(BlockQuantizer):
    """``sign``: one bit a value, times the block's mean magnitude (Bernstein et al., ICML 2018).

    That magnitude makes the squared error as small as one bit and one scale can make it. Biased: wrap it in
    ``error_feedback``.

    Attributes:
        block: values that share a scale, at least 8; costs 32 / block bits a value.
    """

    block: int = 4096

    name = "sign"
    example = "sign"
    rate = "1 + 32/block"
    cost = "O(n)"
    bits = 1
    unbiased = False
    contractive = True

    def __post_init__(self) -> None:
        require_block("sign", self.block)

    def quantize(self, x: Array, bits: int, random: np.random.Generator, out: Codes, scratch: Array) -> Array:
        """See :meth:`BlockQuantizer.quantize`."""
        return signs(x, out, scratch)

    def dequantize(self, codes: Codes, bits: int, scales: Array, out: Array) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        Quantize(1).dequantize(codes, 1, scales, out)


STAGES = (Quantize, Sign)


def signs(x: Array, out: Codes, scratch: Array) -> Array:
    """Code the signs of blocks [n, d]; levels are plus and minus half a scale, twice the mean magnitude."""
    np.greater_equal(x, 0, out=out.view(np.bool_))
    means: Array = np.abs(x, out=scratch).mean(axis=1)
    return 2 * means


def nearest(x: Array, levels: Array, scales: Array, out: Codes, scratch: Array) -> None:
    """Write the index of the level nearest to x / scale: the number of bounds that it reaches."""
    np.multiply(x, inverse(scales)[:, None], out=scratch)
    reached = np.empty(x.shape, np.bool_)
    out[...] = 0
    for bound in (levels[1:] + levels[:-1]) / 2:
        np.greater_equal(scratch, bound, out=reached)
        out += reached.view(np.uint8)


def inverse(scales: Array) -> Array:
    """Return 1 / scales, and 0 where a block is as good as zero."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales >= TINY)


def blocks(matrix: Array, block: int) -> list[Array]:
    """View rows [h, w] as blocks that never cross a row: [h * (w // block), block] and [h, w % block].

    >>> [part.shape for part in blocks(np.zeros((2, 10), np.float32), 4)]
    [(2, 4), (2, 4), (2, 2)]
    """
    height, width = matrix.shape
    whole = width - width % block
    if whole == width or height == 1:
        parts = [matrix[:, :whole].reshape(-1, block)]
    else:
        parts = [matrix[row, :whole].reshape(-1, block) for row in range(height)]
    return [part for part in (*parts, matrix[:, whole:]) if part.size]


def chunks(x: Array, values: int = CHUNK) -> Iterator[slice]:
    """Yield slices of the rows of ``x`` [n, d] that hold about ``values`` each."""
    step = rows_of_chunk(x, values)
    yield from (slice(start, start + step) for start in range(0, len(x), step))


def rows_of_chunk(x: Array, values: int = CHUNK) -> int:
    """Return how many rows of ``x`` hold about ``values``, at least one."""
    return max(1, values // int(x.shape[1]))


def floats(reader: Reader, count: int, part: str) -> Array:
    """Read little-endian float32 values."""
    return np.frombuffer(reader.take(4 * count, part), np.dtype("<f4"))


def require_block(name: str, block: int) -> None:
    """Raise ``ConfigError`` for a block size out of range."""
    if not 8 <= block <= 1 << 20:
        raise ConfigError(f"{name} takes block from 8 to {1 << 20}, got {block}")


def dither(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw uniform values in (0, 1), 16 bits each."""
    count = int(np.prod(shape))
    words = raw_words(random, -(-count // 4)).view("<u2")[:count]
    values = words.astype(np.float32)
    values += np.float32(0.5)
    values *= np.float32(2**-16)
    return values.reshape(shape)


def _half(bits: int) -> float:
    """Steps between zero and the largest level."""
    return (1 << bits - 1) - 1 if bits > 1 else 0.5


def _split(codes: Codes, like: Sequence[Array]) -> Iterator[Codes]:
    """Cut flat codes into views of the shapes of ``like``."""
    start = 0
    for x in like:
        yield codes[start : start + x.size].reshape(x.shape)
        start += x.size


Place = tuple[int, slice | npt.NDArray[np.bool_]]


def _rates(counts: Sequence[int], bits: float) -> list[tuple[int, list[Place]]]:
    """Give every block whole bits such that any run of blocks averages ``bits``.

    Returns, for each rate, which rows of which matrix have it; ``counts`` are the matrices' rows.
    """
    low = int(bits)
    if low == bits:
        return [(low, [(index, slice(None)) for index in range(len(counts))])]
    ends = np.cumsum([0, *counts])
    turns = np.floor(np.arange(ends[-1] + 1) * (bits - low))
    more = np.diff(turns) > 0
    masks = [more[start:end] for start, end in pairwise(ends)]
    return [(low, [(i, ~mask) for i, mask in enumerate(masks)]), (low + 1, list(enumerate(masks)))]
