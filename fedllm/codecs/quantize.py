"""Quantizers: rows of floats to integer codes, with one float32 scale for every block of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from fedllm.codecs.base import Buffer, CodecContext, Reader
from fedllm.codecs.bits import Codes
from fedllm.codecs.chain import Coder, Rows, Shapes, generator
from fedllm.errors import CodecError, ConfigError

__all__ = ["BlockQuantizer", "Float32", "Quantize", "Scales", "Sign", "blocks", "chunks", "unblocks"]

Scales = npt.NDArray[np.float32]

CHUNK = 1 << 16
"""Values that go through all steps of a quantizer at once: 256 KiB of floats, so that they stay in cache."""

TINY = 1e-30
"""Blocks whose largest magnitude is below are zero: their steps would not be normal floats."""


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
        return [matrix.numpy().tobytes() for matrix in rows]

    def decode(self, reader: Reader, shapes: Shapes, coder: Coder, context: CodecContext) -> Rows:
        """Return the values."""
        return [
            torch.from_numpy(floats(reader, height * width, "values").copy()).reshape(height, width)
            for height, width in shapes
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
    def quantize(self, x: torch.Tensor, bits: int, random: np.random.Generator, out: Codes) -> Scales:
        """Write the codes of blocks [n, d] to ``out`` [n, d] and return their scales [n]."""

    @abstractmethod
    def dequantize(self, codes: torch.Tensor, bits: int, scales: torch.Tensor, out: torch.Tensor) -> None:
        """Write the values of codes [n, d] under scales [n] to ``out`` [n, d]."""

    def contracted(self) -> Self:
        """Return itself."""
        return self

    def encode(self, rows: Rows, coder: Coder, context: CodecContext) -> Sequence[Buffer]:
        """Return all scales, then the codes of each rate."""
        matrices = [part for matrix in rows for part in blocks(matrix, self.block)]
        random = generator(context, "quantize")
        scales: list[Scales] = []
        coded: list[Buffer] = []
        for bits, places in _rates([(x.shape[0], x.shape[1]) for x in matrices], self.bits):
            inputs = [matrices[index][selected] for index, selected in places]
            codes = np.empty(sum(x.numel() for x in inputs), np.uint8)
            start = 0
            for x in inputs:
                out = codes[start : start + x.numel()].reshape(tuple(x.shape))
                scales.extend(self.quantize(x[part], bits, random, out[part]) for part in chunks(x))
                start += x.numel()
            coded.extend(coder.encode(codes, 1 << bits))
        joined = np.concatenate(scales)
        if not np.isfinite(joined).all():
            raise CodecError("cannot encode values so large that the scale of a block overflows float32")
        return [joined.tobytes(), *coded]

    def decode(self, reader: Reader, shapes: Shapes, coder: Coder, context: CodecContext) -> Rows:
        """Return rows of values that the grid has."""
        rows = [torch.empty(shape) for shape in shapes]
        matrices = [part for matrix in rows for part in blocks(matrix, self.block)]
        sizes = [(x.shape[0], x.shape[1]) for x in matrices]
        scales = torch.from_numpy(floats(reader, sum(n for n, _ in sizes), "scales").copy())
        for bits, places in _rates(sizes, self.bits):
            outputs = [matrices[index][selected] for index, selected in places]
            codes = torch.from_numpy(coder.decode(reader, sum(x.numel() for x in outputs), 1 << bits))
            for (index, selected), out in zip(places, outputs, strict=True):
                part, codes = codes[: out.numel()].reshape(out.shape), codes[out.numel() :]
                own, scales = scales[: out.shape[0]], scales[out.shape[0] :]
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

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"quantize takes bits from 1 to 8, got {self.bits:g}")
        require_block("quantize", self.block)

    @property
    def unbiased(self) -> bool:
        return self.stochastic

    @property
    def contractive(self) -> bool:
        # To the nearest never moves a value by more than itself. At random the variance is at most step^2 / 4
        # each: a whole block stays below its largest value squared while block < 4 levels^2.
        return not self.stochastic or self.block < 4 * _half(int(self.bits)) ** 2

    def quantize(self, x: torch.Tensor, bits: int, random: np.random.Generator, out: Codes) -> Scales:
        """See :meth:`BlockQuantizer.quantize`."""
        codes = torch.from_numpy(out)
        if bits == 1 and not self.stochastic:
            torch.ge(x, 0, out=codes)
            return np.abs(x.numpy()).mean(axis=1)
        largest = torch.linalg.vector_norm(x, torch.inf, dim=1)
        largest = torch.where(largest < TINY, 0, largest)
        half = _half(bits)
        # Division by zero blocks is avoided with a step of one: all their values round to zero.
        y = x * torch.where(largest > 0, half / largest, 0)[:, None]
        y += half
        y = (y.add_(_dither(random, x)) if self.stochastic else y.add_(0.5)).floor_()
        codes.copy_(y.clamp_(0, 2 * half))
        return (largest / half).numpy()

    def dequantize(self, codes: torch.Tensor, bits: int, scales: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        if bits == 1 and not self.stochastic:
            torch.mul(codes, 2, out=out).sub_(1).mul_(scales[:, None])
        else:
            torch.sub(codes, float(_half(bits)), out=out).mul_(scales[:, None])


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
    bits = 1
    unbiased = False
    contractive = True

    def __post_init__(self) -> None:
        require_block("sign", self.block)

    def quantize(self, x: torch.Tensor, bits: int, random: np.random.Generator, out: Codes) -> Scales:
        """See :meth:`BlockQuantizer.quantize`."""
        return Quantize(1).quantize(x, 1, random, out)

    def dequantize(self, codes: torch.Tensor, bits: int, scales: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        Quantize(1).dequantize(codes, 1, scales, out)


STAGES = (Quantize, Sign)


def blocks(matrix: torch.Tensor, block: int) -> list[torch.Tensor]:
    """View rows [h, w] as blocks that never cross a row: [h * (w // block), block] and [h, w % block].

    >>> [tuple(part.shape) for part in blocks(torch.zeros(2, 10), 4)]
    [(4, 4), (2, 2)]
    """
    height, width = matrix.shape
    whole = width - width % block
    if whole == width or height == 1:
        parts = [matrix[:, :whole].view(-1, block)]
    else:
        parts = [matrix[row, :whole].view(-1, block) for row in range(height)]
    return [part for part in (*parts, matrix[:, whole:]) if part.numel()]


def chunks(x: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the rows of ``x`` [n, d] that hold about ``CHUNK`` values each."""
    step = max(1, CHUNK // max(1, x.shape[1]))
    yield from (slice(start, start + step) for start in range(0, x.shape[0], step))


def floats(reader: Reader, count: int, part: str) -> Scales:
    """Read little-endian float32 values."""
    return np.frombuffer(reader.take(4 * count, part), np.dtype("<f4"))


def require_block(name: str, block: int) -> None:
    """Raise ``ConfigError`` for a block size out of range."""
    if not 8 <= block <= 1 << 20:
        raise ConfigError(f"{name} takes block from 8 to {1 << 20}, got {block}")


def _half(bits: int) -> float:
    """Steps between zero and the largest level."""
    return (1 << bits - 1) - 1 if bits > 1 else 0.5


def _dither(random: np.random.Generator, x: torch.Tensor) -> torch.Tensor:
    """Draw uniform values in (0, 1), 16 bits each, like ``x``."""
    words = random.bit_generator.random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
    return torch.from_numpy(words.astype(np.float32)).add_(0.5).mul_(2**-16).reshape(x.shape)


Place = tuple[int, slice | torch.Tensor]


def _rates(sizes: Shapes, bits: float) -> list[tuple[int, list[Place]]]:
    """Give every block whole bits such that any run of blocks averages ``bits``.

    Returns, for each rate, which rows of which matrix have it.
    """
    low = int(bits)
    if low == bits:
        return [(low, [(index, slice(None)) for index in range(len(sizes))])]
    first = 0
    places: dict[int, list[Place]] = {low: [], low + 1: []}
    for index, (count, _) in enumerate(sizes):
        turn = torch.arange(first, first + count + 1, dtype=torch.float64).mul_(bits - low).floor_()
        more = turn[1:] > turn[:-1]
        places[low + 1].append((index, more.nonzero()[:, 0]))
        places[low].append((index, (~more).nonzero()[:, 0]))
        first += count
    return list(places.items())
