"""Quantizers: rows of floats to integer codes, with one float32 scale for every block of a row.

Element-wise work is torch's, which is the faster at it; sums are numpy's, whose order never changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedllm.codecs.base import Buffer, CodecContext, Reader
from fedllm.codecs.chain import Array, Coder, Rows, Shapes, generator, raw_words
from fedllm.codecs.stages.bits import Codes
from fedllm.errors import CodecError, ConfigError

__all__ = ["BlockQuantizer", "Float32", "Quantize", "Sign", "blocks", "chunks", "dither", "floats"]

CHUNK = 1 << 17
"""Values that go through all steps at once: 512 KiB of floats stay in a second-level cache."""

TINY = 1e-35
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
    def quantize(
        self, x: Tensor, bits: int, random: np.random.Generator, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """Write the codes of blocks ``x`` [n, d] to ``out`` [n, d] and return their scales [n].

        ``scratch`` [n, d] is free to use: memory just touched is many times faster than fresh memory.
        """

    @abstractmethod
    def dequantize(self, codes: Codes, bits: int, scales: Tensor, out: Tensor) -> None:
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
            for matrix, out in zip(inputs, _split(codes, inputs), strict=True):
                x, written = torch.from_numpy(matrix), torch.from_numpy(out)
                scratch = torch.empty(min(len(x), rows_of_chunk(matrix)), x.shape[1])
                scales.extend(
                    self.quantize(x[part], bits, random, written[part], scratch[: len(x[part])]).numpy()
                    for part in chunks(matrix)
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
        scales = torch.from_numpy(floats(reader, sum(len(x) for x in matrices), "scales").copy())
        for bits, places in _rates([len(x) for x in matrices], self.bits):
            outputs = [matrices[index][selected] for index, selected in places]
            codes = coder.decode(reader, sum(x.size for x in outputs), 1 << bits)
            for (index, selected), part, out in zip(places, _split(codes, outputs), outputs, strict=True):
                own, scales = scales[: len(out), None], scales[len(out) :]
                written = torch.from_numpy(out)
                for chunk in chunks(out):
                    self.dequantize(part[chunk], bits, own[chunk], written[chunk])
                if not isinstance(selected, slice):
                    matrices[index][selected] = out
        return rows


@dataclass(frozen=True)
class Quantize(BlockQuantizer):
    """``quantize``: a uniform grid of ``2**bits - 1`` levels with zero among them (two levels at one bit).

    A code is ``x / step`` rounded, to the nearest integer or - ``stochastic``, QSGD (Alistarh et al., NeurIPS
    2017, section 3.1) - up or down at random such that the expectation is ``x``. ``step`` is the block's
    largest magnitude over ``2**(bits-1) - 1``. At one bit a value becomes plus or minus the block's mean
    magnitude, or its largest if stochastic. Right after ``rotate``, see
    :class:`fedllm.codecs.stages.rotate.Eden`.

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

    def quantize(
        self, x: Tensor, bits: int, random: np.random.Generator, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """See :meth:`BlockQuantizer.quantize`."""
        if bits == 1 and not self.stochastic:
            return signs(x, out, scratch)
        half = _half(bits)
        largest = torch.abs(x, out=scratch).amax(dim=1)
        y = torch.mul(x, half * inverse(largest)[:, None], out=scratch)
        if bits < 8:
            y += half
        if self.stochastic:
            y += torch.from_numpy(dither(random, tuple(x.shape)))
            y.floor_().clamp_(max=half if bits == 8 else 2 * half)
        else:
            y.round_()
        # Eight bits are signed as they are; of fewer, codes fit a signed byte, to which a cast is fastest.
        out.view(torch.int8).copy_(y)
        return largest / half

    def dequantize(self, codes: Codes, bits: int, scales: Tensor, out: Tensor) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        np.copyto(out.numpy(), codes.view(np.int8))
        if bits < 8:
            out -= _half(bits)
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

    def quantize(
        self, x: Tensor, bits: int, random: np.random.Generator, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """See :meth:`BlockQuantizer.quantize`."""
        return signs(x, out, scratch)

    def dequantize(self, codes: Codes, bits: int, scales: Tensor, out: Tensor) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        Quantize(1).dequantize(codes, 1, scales, out)


STAGES = (Quantize, Sign)


def signs(x: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """Code the signs of blocks [n, d]; levels are plus and minus half a scale, twice the mean magnitude."""
    np.greater_equal(x.numpy(), 0, out=out.numpy().view(np.bool_))
    return 2 * torch.from_numpy(torch.abs(x, out=scratch).numpy().mean(axis=1))


def nearest(x: Tensor, levels: Array, scales: Tensor, out: Tensor, scratch: Tensor) -> None:
    """Write the index of the level nearest to x / scale: the number of bounds that it reaches."""
    y = torch.mul(x, inverse(scales)[:, None], out=scratch).numpy()
    codes, reached = out.numpy(), np.empty(y.shape, np.bool_)
    codes[...] = 0
    for bound in (levels[1:] + levels[:-1]) / 2:
        np.greater_equal(y, bound, out=reached)
        codes += reached.view(np.uint8)


def inverse(scales: Tensor) -> Tensor:
    """Return 1 / scales, and 0 where a block is as good as zero."""
    return torch.where(scales >= TINY, 1 / scales, 0)


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


NodeContext = tuple[int, slice | npt.NDArray[np.bool_]]


def _rates(counts: Sequence[int], bits: float) -> list[tuple[int, list[NodeContext]]]:
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
