"""Trained tensors as one vector, and back: the space in which directions and forward gradients live.

A vector runs through the tensors in name order. Both ends of a link rebuild steps from it, so nothing here
may round differently from one machine to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from fedllm.tensors import Tensors

__all__ = ["Flat", "entries", "flatten", "norm", "shaped"]

Flat = npt.NDArray[np.float64]
"""Shape (entries,)."""


def entries(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the length of the vector."""
    return sum(tensor.numel() for tensor in tensors.values())


def flatten(tensors: Mapping[str, torch.Tensor]) -> Flat:
    """Return the tensors one after another in name order, shape (entries,).

    >>> flatten({"b": torch.ones(1, 2), "a": torch.zeros(1)}).tolist()
    [0.0, 1.0, 1.0]
    """
    return np.concatenate([tensors[name].double().reshape(-1).numpy() for name in sorted(tensors)])


def shaped(flat: Flat, like: Mapping[str, torch.Tensor]) -> Tensors:
    """Cut a vector into float32 tensors of the given names and shapes; inverts :func:`flatten`."""
    out: Tensors = {}
    start = 0
    for name in sorted(like):
        end = start + like[name].numel()
        out[name] = torch.from_numpy(flat[start:end].astype(np.float32)).reshape(like[name].shape)
        start = end
    return out


def norm(flat: Flat) -> float:
    """Return the L2 norm; the sum is exactly rounded, so that every machine gets the same.

    >>> norm(np.array([3.0, 4.0]))
    5.0
    """
    return math.sqrt(math.fsum((flat * flat).tolist()))
