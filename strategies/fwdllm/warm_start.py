"""A linear head in one closed-form round, without any gradient.

Clients send sums over their texts; sums add up to the same statistics however the texts are shared out.
``means`` sets each class's weights to the mean of its unit features, ``cosine`` to that mean's direction
(FedNCM, Legate et al., NeurIPS 2023), ``ridge`` to the least-squares classifier (Fed3R, Fani et al., ICML
2024).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from fedllm.errors import RejectedReply, WireError
from fedllm.tensors import Spec, Tensors, TensorSpec
from strategies.fwdllm.options import Start

__all__ = ["Start", "counted", "head", "pack_head", "statistics", "statistics_spec", "unpack_head"]

Indices = npt.NDArray[np.int64]

_RIDGE = 1.0
"""Penalty in units of unit-length features, where the Gram matrix of n texts has trace n."""
_RIDGE_SCALE = 8.0
"""Least squares fits targets of 0 and 1; logits that differ by 1 would hardly prefer any class."""


def statistics_spec(start: Start, classes: int, width: int) -> dict[str, TensorSpec]:
    """Describe a client's statistics; those of ``ridge`` grow with the square of the width.

    >>> sum(s.nbytes for s in statistics_spec("means", 5, 384).values())
    7700
    >>> sum(s.nbytes for s in statistics_spec("ridge", 5, 384).values())
    303380
    """
    spec = {"counts": TensorSpec((classes,)), "sums": TensorSpec((classes, width))}
    if start == "ridge":
        spec["gram"] = TensorSpec((width * (width + 1) // 2,))
    return spec


def statistics(
    features: Callable[[Indices], torch.Tensor],
    labels: Indices,
    spec: Spec,
    batch_size: int = 64,
) -> Tensors:
    """Sum unit features over a client's texts: by class, and for ``ridge`` their outer products.

    Args:
        features: maps the numbers of b texts to what the head sees of them, [b, width].
        labels: class of each text.
        spec: from :func:`statistics_spec`.
        batch_size: texts at a time.

    Returns:
        ``counts`` [classes], ``sums`` [classes, width] and, for ``ridge``, ``gram``: its upper
        triangle by rows.
    """
    classes, width = spec["sums"].shape
    sums = torch.zeros(classes, width, dtype=torch.float64)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for first in range(0, len(labels), batch_size):
        indices = np.arange(first, min(first + batch_size, len(labels)))
        unit = functional.normalize(features(indices).cpu().double(), dim=-1)
        sums.index_add_(0, torch.from_numpy(labels[indices]), unit)
        if "gram" in spec:
            gram += unit.T @ unit
    counts = torch.bincount(torch.from_numpy(labels), minlength=classes)
    found: Tensors = {"counts": counts.float(), "sums": sums.float()}
    if "gram" in spec:
        rows, columns = torch.triu_indices(width, width)
        found["gram"] = gram[rows, columns].float()
    return found


def counted(found: Tensors, claimed: int, examples: int) -> Tensors:
    """Server: check that statistics can be sums over so many unit features, and bound their weight.

    Args:
        found: as :func:`statistics` returns them.
        claimed: texts that they are said to stand for.
        examples: texts that they may count for; statistics of more are scaled down.

    Raises:
        RejectedReply: no texts have such statistics.

    >>> one = {"counts": torch.tensor([1.0, 1.0]), "sums": torch.eye(2)}
    >>> counted(one, claimed=2, examples=1)["counts"].tolist()
    [0.5, 0.5]
    """
    counts, slack = found["counts"].double(), 1.0 + 1e-4
    whole = bool((counts >= 0).all()) and bool((counts == counts.round()).all())
    if not whole or int(counts.sum()) != claimed:
        raise RejectedReply(f"its counts by class do not add up to the {claimed} texts that it claims")
    if bool((found["sums"].double().norm(dim=1) > counts * slack).any()):
        raise RejectedReply("sums of unit features are longer than the numbers of texts behind them")
    if "gram" in found and float(found["gram"].abs().max()) > claimed * slack:
        raise RejectedReply(f"products of unit features add up to more than the {claimed} texts behind them")
    if examples >= claimed:
        return found
    return {name: tensor * (examples / claimed) for name, tensor in found.items()}


def head(start: Start, total: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the federation's summed statistics into a head for features of length sqrt(width).

    A class that nobody holds gets weights 0.

    Returns:
        Weight [classes, width] and bias [classes], float32.
    """
    counts, sums = total["counts"].double(), total["sums"].double()
    width = sums.shape[1]
    if start == "ridge":
        gram = torch.zeros(width, width, dtype=torch.float64)
        rows, columns = torch.triu_indices(width, width)
        gram[rows, columns] = total["gram"].double()
        gram = gram + gram.T - torch.diag(gram.diagonal())
        solved = torch.linalg.solve(gram + _RIDGE * torch.eye(width, dtype=torch.float64), sums.T)
        weight = solved.T * _RIDGE_SCALE / width**0.5
    else:
        weight = sums / counts.clamp(min=1.0).unsqueeze(1)
        if start == "cosine":
            weight = functional.normalize(weight, dim=1)
    return weight.float(), torch.zeros(len(counts))


def pack_head(weight: torch.Tensor, bias: torch.Tensor) -> bytes:
    """Lay a head out: weight by rows, then bias, float32 little-endian."""
    return torch.cat([weight.reshape(-1), bias]).numpy().astype("<f4").tobytes()


def unpack_head(record: bytes, classes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert :func:`pack_head`; raises ``WireError`` for a head of another size.

    >>> weight, bias = torch.ones(2, 3), torch.zeros(2)
    >>> [t.tolist() for t in unpack_head(pack_head(weight, bias), 2, 3)]
    [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [0.0, 0.0]]
    """
    if len(record) != 4 * classes * (width + 1):
        raise WireError(f"a head of {len(record)} bytes does not fit {classes} classes of width {width}")
    flat = torch.from_numpy(np.frombuffer(record, dtype="<f4").astype(np.float32))
    weight, bias = torch.split(flat, [classes * width, classes])
    return weight.reshape(classes, width), bias
