"""Randomised Hadamard rotation, and the quantizer that knows what rotated values look like.

After x -> H D x (D random signs, H the orthonormal Hadamard matrix) the values of a block are close to Gaussian
whatever ``x`` was, so one fixed grid suits every block. EDEN (Vargaftik et al., ICML 2022) adds the scale that
makes the decoded vector unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from fedllm.codecs.base import CodecContext, Reader
from fedllm.codecs.bits import Codes
from fedllm.codecs.chain import Rows, Shapes, generator
from fedllm.codecs.quantize import BlockQuantizer, Scales, chunks
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

    Rows of any width are rotated without padding: whole blocks one by one, then a window as wide as the largest
    power of two that fits, aligned to the row's end, so that the remainder is mixed with what precedes it.

    Attributes:
        block: values per transform, a power of two from 64 to 65536.
    """

    block: int = 4096

    name = "rotate"
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

    def _rotate(self, matrix: torch.Tensor, context: CodecContext, *, inverse: bool) -> torch.Tensor:
        height, width = matrix.shape
        random = generator(context, "rotate")
        if width < DENSE:
            basis = _uniform(random, width)
            return matrix @ (basis.T if inverse else basis)
        size = min(self.block, 1 << width.bit_length() - 1)
        whole = width - width % size
        windows = [(0, whole)]
        if whole < width:
            # The middle one comes again, or what only the last has touched would not be spread.
            windows += [(width - size, width), (whole - size, whole)]
        result = matrix.clone()
        signs = _signs(random, (len(windows), size))
        steps = list(zip(windows, signs, strict=True))
        for (start, end), sign in reversed(steps) if inverse else steps:
            part = result[:, start:end]
            part.copy_(_transform(part.reshape(-1, size), sign, inverse).reshape(height, -1))
        return result


@dataclass(frozen=True)
class Eden(BlockQuantizer):
    """``quantize`` or ``sign`` right after ``rotate``: Lloyd-Max grids for N(0, 1) at 1 to 4 bits.

    A block y is coded as the nearest centroids c of y / rms(y), and decoded as S c. With S = |y|^2 / <y, c> the
    decoded vector is unbiased over rotations (EDEN, theorem 2.1); with S = <y, c> / |c|^2 its error is least:
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
        return type(self)(self.bits, self.block, unbiased=False)

    def quantize(self, x: torch.Tensor, bits: int, random: np.random.Generator, out: Codes) -> Scales:
        """See :meth:`BlockQuantizer.quantize`."""
        codes = torch.from_numpy(out)
        grid, bounds = _grid(bits)
        y = x.numpy()
        norm = np.einsum("nd,nd->n", y, y)
        if bits == 1:
            torch.ge(x, 0, out=codes)
            dot = np.abs(y).sum(axis=1) * grid[1].item()
        else:
            rms = torch.from_numpy(np.sqrt(norm / y.shape[1]))[:, None]
            codes.copy_(torch.bucketize(x / torch.where(rms > 0, rms, 1), bounds))
            c = grid[codes.int()].numpy()
            dot = np.einsum("nd,nd->n", y, c)
        if self.unbiased:
            return np.divide(norm, dot, out=np.zeros_like(norm), where=dot > 0)
        energy = (
            np.einsum("nd,nd->n", c, c) if bits > 1 else np.full_like(norm, y.shape[1] * grid[1].item() ** 2)
        )
        return np.divide(dot, energy, dtype=np.float32)

    def dequantize(self, codes: torch.Tensor, bits: int, scales: torch.Tensor, out: torch.Tensor) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        grid, _ = _grid(bits)
        torch.mul(grid[codes.int()], scales[:, None], out=out)


STAGES = (Rotate,)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Apply the Hadamard matrix (entries +1 and -1, rows in an order of our own) to every row of ``x`` [n, d].

    ``d`` is a power of two. Only additions and subtractions in a fixed order: the same bits on every machine and
    number of threads. Twice is not the identity; :func:`inverse_hadamard` is the inverse times ``d``.

    >>> hadamard(torch.eye(2)).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    count, size = x.shape
    first = 1 << (size.bit_length() - 1) // 2
    x = _butterflies(x.reshape(-1), count, first, size // first)
    x = x.view(count, first, size // first).transpose(1, 2).reshape(-1)
    return _butterflies(x, count, size // first, first).view(count, size)


def inverse_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Apply the transpose of the matrix of :func:`hadamard` to every row of ``x`` [n, d]."""
    count, size = x.shape
    first = 1 << (size.bit_length() - 1) // 2
    x = _butterflies(x.reshape(-1), count, size // first, first)
    x = x.view(count, size // first, first).transpose(1, 2).reshape(-1)
    return _butterflies(x, count, first, size // first).view(count, size)


def _butterflies(x: torch.Tensor, count: int, size: int, inner: int) -> torch.Tensor:
    """Transform the middle axis of ``x``, which is laid out as [count, size, inner]."""
    half = 1
    while half < size:
        pairs = x.view(count * size // (2 * half), 2, half * inner)
        result = torch.empty_like(pairs)
        torch.add(pairs[:, 0], pairs[:, 1], out=result[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=result[:, 1])
        x, half = result.view(-1), 2 * half
    return x


def _transform(x: torch.Tensor, sign: torch.Tensor, inverse: bool) -> torch.Tensor:
    result = torch.empty_like(x)
    for part in chunks(x):
        result[part] = inverse_hadamard(x[part]) * sign if inverse else hadamard(x[part] * sign)
    return result


def _signs(random: np.random.Generator, shape: tuple[int, int]) -> torch.Tensor:
    """Draw signs over the root of the transform's size, which makes it orthonormal."""
    bits = random.integers(0, 2, shape, np.int8).astype(np.float32)
    return torch.from_numpy((2 * bits - 1) / np.float32(np.sqrt(shape[1])))


def _uniform(random: np.random.Generator, size: int) -> torch.Tensor:
    """Draw an orthonormal matrix from the uniform distribution (Stewart, SIAM J. Numer. Anal. 1980)."""
    q, r = np.linalg.qr(random.standard_normal((size, size)))
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))


def _grid(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all centroids in ascending order and the bounds between them."""
    half = torch.tensor(CENTROIDS[bits])
    grid = torch.cat([-half.flip(0), half])
    return grid, (grid[1:] + grid[:-1]) / 2
