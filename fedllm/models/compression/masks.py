"""Weights that are zero and stay zero: only the others are trained, and travel.

The trained tensor of a masked matrix is the vector of the weights that are left, in the order of the matrix;
the matrix is made of it whenever it is asked for. So no method, codec or sum meets a zero that it could fill,
and what is masked is never sent. Masks are a function of the base model's weights: all nodes derive the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedllm.config.model import Pruning
from fedllm.errors import ModelError
from fedllm.models.anatomy import layers, plain

__all__ = ["Scattered", "dense", "held", "magnitude", "mask", "n_of_m", "prune"]


class Scattered(nn.Module):
    """Makes a matrix of its weights that are left; all others are zero.

    Args:
        kept: bool, of the matrix's shape: what is left.
    """

    places: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.shape = kept.shape
        self.register_buffer("places", kept.flatten().nonzero().flatten(), persistent=False)

    def forward(self, left: Tensor) -> Tensor:
        """Return the matrix, from [weights that are left]."""
        return left.new_zeros(self.shape.numel()).index_copy(0, self.places, left).view(self.shape)

    def right_inverse(self, matrix: Tensor) -> Tensor:
        """Return what is left of a matrix."""
        return matrix.flatten()[self.places]


def prune(backbone: Any, pruning: Pruning, name: str) -> None:
    """Mask a model's trained matrices in place: those of its layers, and its table of tokens.

    Neither frozen matrices are masked, which never travel, nor output matrices and tables shared with one.

    Args:
        backbone: a transformers model, without an adapter.
        pruning: how.
        name: of the model, for people.

    Raises:
        ModelError: there is no such matrix, none has a zero, or its rows are no multiple of a group.
    """
    found = list(_matrices(backbone))
    if not found:
        raise ModelError(f"model.prune masks linear layers that are trained, and {name} has none")
    if found[0].weight.is_meta:
        raise ModelError("which weights model.prune leaves is known from weights alone, not from shapes")
    for module in found:
        kept = mask(module.weight.detach(), pruning)
        if not kept.all():
            parametrize.register_parametrization(module, "weight", Scattered(kept))
    if not any(map(parametrize.is_parametrized, layers(backbone).modules())):  # a table's padding is zero
        raise ModelError(
            f'model.prune = "zeros" keeps the zeros of its base, and no matrix of {name} has any'
        )


def _matrices(backbone: Any) -> Iterator[Any]:
    for module in layers(backbone).modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            yield module
    model = plain(backbone)
    table, last = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight.requires_grad and (last is None or last.weight is not table.weight):
        yield table


def mask(matrix: Tensor, pruning: Pruning) -> Tensor:
    """Return which weights of a matrix [rows, width] stay, bool of its shape."""
    if pruning.kind == "zeros":
        return matrix != 0
    strength = matrix.abs()
    return (
        magnitude(strength, pruning.share) if pruning.kind == "magnitude" else n_of_m(strength, *pruning.of)
    )


def magnitude(strength: Tensor, share: float) -> Tensor:
    """Keep the strongest weights of a matrix; of equal ones the earlier.

    >>> magnitude(torch.tensor([[1.0, 4.0], [2.0, 3.0]]), 0.5).tolist()
    [[False, True], [False, True]]
    """
    kept = torch.zeros(strength.numel(), dtype=torch.bool, device=strength.device)
    order = strength.flatten().sort(descending=True, stable=True).indices
    kept[order[: strength.numel() - round(share * strength.numel())]] = True
    return kept.view(strength.shape)


def n_of_m(strength: Tensor, n: int, m: int) -> Tensor:
    """Keep the n strongest of every m neighbours in a row, the pattern of sparse tensor cores.

    Raises:
        ModelError: m does not divide a row.

    >>> n_of_m(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 2, 4).tolist()
    [[False, True, False, True]]
    """
    if strength.shape[-1] % m:
        raise ModelError(
            f"model.prune keeps {n} of {m} neighbours, and a row of {strength.shape[-1]} has a rest"
        )
    groups = strength.reshape(*strength.shape[:-1], -1, m)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True)
    return kept.view(strength.shape)


def dense(backbone: nn.Module) -> dict[str, Tensor] | None:
    """Return a model's weights by the names that they have where nothing is masked; None where nothing is."""
    masked = {n: m for n, m in backbone.named_modules() if parametrize.is_parametrized(m)}
    if not masked:
        return None
    weights = {n: t for n, t in backbone.state_dict().items() if ".parametrizations." not in n}
    return weights | {f"{n}.weight": m.weight.detach() for n, m in masked.items()}


def held(module: nn.Module) -> int:
    """Return how many weights a module's masked matrices hold beside those that are left."""
    scattered = [part for part in module.modules() if isinstance(part, Scattered)]
    return sum(part.shape.numel() - len(part.places) for part in scattered)
