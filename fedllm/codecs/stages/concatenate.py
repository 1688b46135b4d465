"""The layout that goes without saying: all tensors become a few matrices, whatever their shapes.

Per-tensor headers cost more than small tensors' content, and per-tensor calls more than their arithmetic. So
tensors of equal size are stacked as rows of one matrix, and those too small to deserve a scale share one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from fedllm.codecs.base import CodecContext, Reader
from fedllm.codecs.chain import Rows, Shapes
from fedllm.tensors import Spec, Tensors, spec_of

__all__ = ["Concatenate"]

SMALL = 256
"""Tensors of fewer values share one row: a scale of their own would cost more than an eighth of a bit."""

STACKED = 1 << 16
"""Tensors of more values are rows by themselves, so that nothing large is copied."""


@dataclass(frozen=True)
class Concatenate:
    """Stack and concatenate tensors in an order that follows from their names and sizes alone."""

    multiplies = False
    linear = True
    unbiased = True
    contractive = True

    def contracted(self) -> Concatenate:
        """Return itself."""
        return self

    def encode(self, tensors: Tensors, context: CodecContext) -> tuple[Rows, bytes]:
        """Return rows; there is no side information."""
        rows = []
        for names, (height, width) in _matrices(spec_of(tensors)):
            flat = [tensors[name].detach().reshape(-1).to(torch.float32).numpy() for name in names]
            rows.append((flat[0] if len(flat) == 1 else np.concatenate(flat)).reshape(height, width))
        return rows, b""

    def outline(self, spec: Spec, reader: Reader) -> tuple[Shapes, list[list[str]]]:
        """Return the shapes of the matrices and the names that each holds."""
        matrices = _matrices(spec)
        return [shape for _, shape in matrices], [names for names, _ in matrices]

    def decode(self, rows: Rows, plan: list[list[str]], spec: Spec) -> Tensors:
        """Cut the rows into tensors."""
        tensors = {name: torch.zeros(item.shape) for name, item in spec.items() if not item.numel}
        for matrix, names in zip(rows, plan, strict=True):
            ends = np.cumsum([spec[name].numel for name in names])
            pieces = np.split(matrix.reshape(-1), ends[:-1])
            for name, piece in zip(names, pieces, strict=True):
                # A small tensor gets memory of its own, or it would keep its whole matrix alive.
                own = piece if len(names) == 1 else piece.copy()
                tensors[name] = torch.from_numpy(own).reshape(spec[name].shape)
        return tensors


def _matrices(spec: Spec) -> list[tuple[list[str], tuple[int, int]]]:
    """Return, for each matrix, the names in it and its shape; tensors without values are in none."""
    sizes = sorted((item.numel, name) for name, item in spec.items() if item.numel)
    small = [name for size, name in sizes if size < SMALL]
    matrices = [(small, (1, sum(spec[name].numel for name in small)))] if small else []
    for size, group in groupby((pair for pair in sizes if pair[0] >= SMALL), key=lambda pair: pair[0]):
        names = [name for _, name in group]
        if size <= STACKED:
            matrices.append((names, (len(names), size)))
        else:
            matrices.extend(([name], (1, size)) for name in names)
    return matrices
