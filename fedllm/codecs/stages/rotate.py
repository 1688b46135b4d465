"""Randomised Hadamard rotation, and the quantizer that knows what rotated values look like.

After x -> H D x (D random signs, H the orthonormal Hadamard matrix) the values of a block are close to
Gaussian, so one fixed grid suits every block. EDEN (Vargaftik et al., ICML 2022) adds the scale that makes
the decoded vector unbiased. Both hold for blocks with many non-zero values; two or three are not spread
enough, and what is decoded leans to the largest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedllm.codecs.base import CodecContext, Reader
from fedllm.codecs.chain import Array, Rows, Shapes, generator, raw_words
from fedllm.codecs.stages.bits import Codes
from fedllm.codecs.stages.quantize import TINY, BlockQuantizer, chunks, nearest, rows_of_chunk
from fedllm.errors import ConfigError

__all__ = ["Eden", "Rotate", "hadamard"]

DENSE = 64
"""Rows narrower than this are rotated by a uniformly random matrix: few signs make few rotations."""

CENTROIDS: dict[int, tuple[float, ...]] = {
    1: (0.7978845608,),
    2: (0.4527800398, 1.5104176087),
    3: (0.2450941789, 0.7560052489, 1.3439092613, 2.1519457045),
    4: (
        0.1283950280,
        0.3880482939,
        0.6567591185,
        0.9423402690,
        1.2562308843,
        1.6180462860,
        2.0690172840,
        2.7326357763,
    ),
}
"""Positive half of the grid with the least mean squared error for N(0, 1) (Lloyd 1957; Max 1960, table I)."""


@dataclass(frozen=True)
class Rotate:
    """``rotate``: orthonormal Hadamard transforms of blocks with random signs.

    Rows of any width are rotated without padding: whole blocks one by one, then a window as wide as the
    largest power of two that fits, aligned to the row's end, which mixes the remainder with what precedes it.

    Attributes:
        block: values per transform, a power of two from 64 to 65536.
    """

    block: int = 4096

    name = "rotate"
    example = "rotate | quantize(bits=1)"
    rate = "of the quantizer"
    cost = "O(n log block)"
    kind = "transform"

    linear = True
    unbiased = True
    contractive = True

    def __post_init__(self) -> None:
        if not 64 <= self.block <= 65536 or self.block & self.block - 1:
            raise ConfigError(f"rotate takes a power of two from 64 to 65536 as block, got {self.block}")

    def contracted(self) -> Self:
        """Return itself."""
        return self

    def encode(self, rows: Rows, context: CodecContext) -> tuple[Rows, bytes]:
        """Return rotated rows; there is no side information."""
        return [self._rotate(matrix, context, inverse=False) for matrix in rows], b""

    def outline(self, shapes: Shapes, reader: Reader, context: CodecContext) -> tuple[Shapes, None]:
        """Return the same shapes."""
        return shapes, None

    def decode(self, rows: Rows, plan: Any, shapes: Shapes, context: CodecContext) -> Rows:
        """Rotate back."""
        return [self._rotate(matrix, context, inverse=True) for matrix in rows]

    def _rotate(self, matrix: Array, context: CodecContext, *, inverse: bool) -> Array:
        height, width = matrix.shape
        random = generator(context, "rotate")
        if width < DENSE:
            basis = _uniform(random, width)
            return matrix @ (basis.T if inverse else basis)
        size = min(self.block, 1 << width.bit_length() - 1)
        whole = width - width % size
        windows = [(0, whole)]
        if whole < width:
            # The last whole one comes again, or what only the window at the end touched would not be spread.
            windows += [(width - size, width), (whole - size, whole)]
        steps = list(zip(windows, _signs(random, (len(windows), size)), strict=True))
        result = np.empty_like(matrix) if len(steps) == 1 else matrix.copy()
        source = matrix
        for (start, end), signs in reversed(steps) if inverse else steps:
            blocks = source[:, start:end].reshape(-1, size)
            result[:, start:end] = _transform(blocks, signs, inverse).reshape(height, -1)
            source = result
        return result


@dataclass(frozen=True)
class Eden(BlockQuantizer):
    """``quantize`` or ``sign`` right after ``rotate``: Lloyd-Max grids for N(0, 1) at 1 to 4 bits.

    A block y is coded as the nearest centroids c of y / rms(y) and decoded as S c. With S = |y|^2 / <y, c>
    the decoded vector is unbiased over rotations; with S = <y, c> / |c|^2 its error is least:
    .363 instead of .571 of the squared norm at one bit, which is what error feedback wants.

    Attributes:
        bits: 1 to 4, fractions as for ``quantize``.
        block: values that share a scale.
        unbiased: which of the two scales.
    """

    bits: float
    block: int
    unbiased: bool = True

    contractive = True

    def contracted(self) -> Self:
        """Return the variant with the least squared error."""
        return replace(self, unbiased=False)

    def quantize(
        self, x: Tensor, bits: int, random: np.random.Generator, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """See :meth:`BlockQuantizer.quantize`."""
        x, energy, factors = _moderate(x)
        grid, y = _grid(bits), x.numpy()
        if bits == 1:
            np.greater_equal(y, 0, out=out.numpy().view(np.bool_))
            dot = torch.from_numpy(torch.abs(x, out=scratch).numpy().sum(axis=1)) * float(grid[1])
            norm = torch.full_like(dot, x.shape[1] * float(grid[1]) ** 2)
        else:
            nearest(x, grid, (energy / x.shape[1]).sqrt(), out, scratch)
            centroids = np.take(grid, out.numpy(), out=scratch.numpy(), mode="clip")
            dot, norm = _dot(y, centroids), _dot(centroids, centroids)
        return factors * (torch.where(dot > 0, energy / dot, 0) if self.unbiased else dot / norm)

    def dequantize(self, codes: Codes, bits: int, scales: Tensor, out: Tensor) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        grid = _grid(bits)
        if bits == 1:
            np.copyto(out.numpy(), codes)
            out.sub_(0.5).mul_(2 * float(grid[1]) * scales)
        else:
            np.take(grid, codes, out=out.numpy(), mode="clip")
            out *= scales


STAGES = (Rotate,)


def hadamard(x: Array) -> Array:
    """Multiply every row of ``x`` [n, d] by Sylvester's Hadamard matrix of +1 and -1; d is a power of two.

    Nothing but additions and subtractions in a fixed order: the same bits on every machine.

    >>> hadamard(np.array([[3, 1, 0, 0]], np.float32)).tolist()
    [[4.0, 2.0, 4.0, 2.0]]
    """
    y = torch.from_numpy(x.reshape(-1).copy())
    return _hadamard(y, torch.empty_like(y), x.shape[1]).numpy().reshape(x.shape)


def _hadamard(y: Tensor, spare: Tensor, size: int) -> Tensor:
    """Transform flat ``y``, overwriting it and ``spare``; returns one of the two.

    H = H1 x H2: transform columns, transpose, transform columns, transpose. Strides of one value, which a
    textbook loop begins with, would cost most of the time.
    """
    inner = 1 << size.bit_length() // 2
    for height, width in ((size // inner, inner), (inner, size // inner)):
        y, spare = _columns(y, spare, height, width)
        spare.view(-1, width, height).copy_(y.view(-1, height, width).transpose(1, 2))
        y, spare = spare, y
    return y


def _columns(y: Tensor, spare: Tensor, size: int, inner: int) -> tuple[Tensor, Tensor]:
    """Transform the middle axis of flat ``y``, laid out as [n, size, inner]; returns result and spare."""
    half = 1
    while half < size:
        pairs, sums = y.view(-1, 2, half * inner), spare.view(-1, 2, half * inner)
        torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        y, spare, half = spare, y, 2 * half
    return y, spare


def _transform(blocks: Array, signs: Array, inverse: bool) -> Array:
    """Rotate blocks [n, d] by signs [d], which carry the factor that makes the transform orthonormal."""
    x, factor = torch.from_numpy(blocks), torch.from_numpy(signs)
    result = torch.empty_like(x)
    first, second = torch.empty(2, min(len(x), rows_of_chunk(blocks)), x.shape[1])
    for part in chunks(blocks):
        y, spare = first[: len(x[part])], second[: len(x[part])]
        y.copy_(x[part]) if inverse else torch.mul(x[part], factor, out=y)
        y = _hadamard(y.view(-1), spare.view(-1), x.shape[1]).view(y.shape)
        torch.mul(y, factor, out=result[part]) if inverse else result[part].copy_(y)
    return result.numpy()


def _moderate(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring blocks [n, d] whose squares float32 cannot add up to magnitudes near 1; others stay as they are.

    Returns:
        The blocks, their squared norms [n], and the powers of two [n] by which they were divided, exactly.
    """
    energy = _dot(x.numpy(), x.numpy())
    odd = ~((energy > 1e-25) & (energy < 1e30))
    if not odd.any():
        return x, energy, torch.ones_like(energy)
    largest = x.abs().amax(dim=1)
    powers = torch.where(odd & (largest >= TINY), torch.frexp(largest).exponent, 0)
    x = torch.ldexp(x, -powers[:, None])
    x[largest < TINY] = 0
    return x, _dot(x.numpy(), x.numpy()), torch.ldexp(torch.ones_like(energy), powers)


def _dot(a: Array, b: Array) -> Tensor:
    """Return the inner products of the rows of a and b [n, d], summed in one order whatever the threads."""
    return torch.from_numpy(np.einsum("nd,nd->n", a, b))


def _signs(random: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Draw signs over the root of the transform's size [number of windows, size]."""
    count = shape[0] * shape[1]
    bits = np.unpackbits(raw_words(random, -(-count // 64)).view(np.uint8), count=count, bitorder="little")
    return (2 * bits.astype(np.float32) - 1).reshape(shape) / np.float32(np.sqrt(shape[1]))


def _uniform(random: np.random.Generator, size: int) -> Array:
    """Draw an orthonormal matrix from the uniform distribution (Stewart, SIAM J. Numer. Anal. 1980)."""
    uniform = (raw_words(random, 2 * size * size).reshape(2, size, size) >> np.uint64(11)) * 2.0**-53
    normal = np.sqrt(-2 * np.log1p(-uniform[0])) * np.cos(2 * np.pi * uniform[1])
    q, r = np.linalg.qr(normal)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def _grid(bits: int) -> Array:
    """Return all centroids in ascending order."""
    half = np.array(CENTROIDS[bits], np.float32)
    return np.concatenate([-half[::-1], half])
