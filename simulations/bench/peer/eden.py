"""EDEN as its paper describes it (Vargaftik et al., ICML 2022): what our rotation is measured against.

The whole vector is padded to a power of two and rotated by one randomised Hadamard transform; its values are
coded by the nearest Lloyd-Max centroid, and one scale makes the result unbiased.
"""

from __future__ import annotations

import math

import torch

__all__ = ["decode", "encode", "rotate"]

_HALF = {
    1: [0.79788],
    2: [0.45278, 1.51042],
    4: [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73264],
}


def rotate(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return H D x for x [d] padded with zeros to the length of ``signs``, a power of two."""
    size = signs.numel()
    y = torch.zeros(size)
    y[: x.numel()] = x
    return _hadamard(y * signs)


def encode(x: torch.Tensor, bits: int, signs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (uint8, not packed) and the scale of x [d]."""
    y = rotate(x, signs)
    grid = _grid(bits)
    normalised = y * (math.sqrt(y.numel()) / y.norm())
    codes = torch.bucketize(normalised, (grid[1:] + grid[:-1]) / 2)
    scale = y.square().sum() / torch.dot(y, grid[codes])
    return codes.to(torch.uint8), scale


def decode(
    codes: torch.Tensor, scale: torch.Tensor, bits: int, signs: torch.Tensor, size: int
) -> torch.Tensor:
    """Return the unbiased estimate of x [size]."""
    return (_hadamard(_grid(bits)[codes.long()] * scale) * signs)[:size]


def _hadamard(y: torch.Tensor) -> torch.Tensor:
    size, half = y.numel(), 1
    while half < size:
        pairs = y.view(-1, 2, half)
        y = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).view(-1)
        half *= 2
    return y / math.sqrt(size)


def _grid(bits: int) -> torch.Tensor:
    half = torch.tensor(_HALF[bits])
    return torch.cat([-half.flip(0), half])
