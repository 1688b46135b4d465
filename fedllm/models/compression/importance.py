"""What of a model matters, measured on texts: how much layers change, how strongly inputs of matrices speak.

    block influence of a layer    1 - E cos(input, output)          (ShortGPT, Men et al., 2024, equation 1)
    strength of a weight          |W_ij| * sqrt(E x_j^2)            (Wanda, Sun et al., ICLR 2024, equation 1)
    strength of a neuron, heads   the norm of its columns' strengths in the matrix behind it

Averages run over the tokens of texts, padding left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedllm.models.anatomy import layers as layers_of
from fedllm.models.compression.structure import feed_forward, groups_of

__all__ = ["Measured", "groups", "measure", "most_influential", "neurons", "spread", "strength"]


@dataclass(frozen=True)
class Measured:
    """Sums over tokens.

    Attributes:
        tokens: how many.
        influence: of each layer, 1 - cos summed.
        squares: of the inputs of each linear layer, by its identity, [width] float64 each.
    """

    tokens: int
    influence: list[float]
    squares: dict[int, Tensor]


def measure(backbone: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> Measured:
    """Send texts through a model, without dropout, and note what its layers and matrices see.

    Args:
        backbone: a transformers model.
        batches: ids and mask of texts, [b, t] int64 each.
    """
    watch = _Watch(backbone)
    training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            for ids, mask in batches:
                watch.mask = mask.bool()
                backbone(input_ids=ids, attention_mask=mask)
                watch.tokens += int(mask.sum())
    finally:
        watch.end()
        backbone.train(training)
    return Measured(watch.tokens, watch.influence, watch.squares)


class _Watch:
    """Hooks at every layer, and at every linear layer inside one."""

    mask: Tensor

    def __init__(self, backbone: Any) -> None:
        stack = layers_of(backbone)
        self.tokens, self.influence = 0, [0.0] * len(stack)
        self.squares: dict[int, Tensor] = {}
        self._hooks = []
        for number, layer in enumerate(stack):
            self._hooks.append(layer.register_forward_hook(self._layer(number)))
            for part in layer.modules():
                if isinstance(part, nn.Linear):
                    self.squares[id(part)] = torch.zeros(part.in_features, dtype=torch.float64)
                    self._hooks.append(part.register_forward_pre_hook(self._linear))

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _layer(self, number: int) -> Any:
        def look(layer: nn.Module, given: tuple[Tensor, ...], found: Any) -> None:
            after = found[0] if isinstance(found, tuple) else found
            alike = functional.cosine_similarity(given[0].float(), after.float(), dim=-1)
            self.influence[number] += float((1 - alike)[self.mask].sum())

        return look

    def _linear(self, part: nn.Linear, given: tuple[Tensor, ...]) -> None:
        self.squares[id(part)] += given[0][self.mask].double().square().sum(0)


def spread(
    backbone: Any, parts: Mapping[str, nn.Module], batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return the sum over tokens of x x' [width, width] float64, x the input of each part by its name."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def look(part: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs = given[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + (inputs.T @ inputs).double()

        return look

    hooks = [part.register_forward_pre_hook(hook(name)) for name, part in parts.items()]
    backbone.eval()
    try:
        with torch.inference_mode():
            for ids, mask in batches:
                backbone(input_ids=ids, attention_mask=mask)
    finally:
        for one in hooks:
            one.remove()
    return sums


def most_influential(found: Measured, count: int) -> tuple[int, ...]:
    """Return the layers that change what they are given most, in ascending order.

    >>> most_influential(Measured(1, [0.3, 0.1, 0.2], {}), 2)
    (0, 2)
    """
    order = sorted(range(len(found.influence)), key=lambda layer: (-found.influence[layer], layer))
    return tuple(sorted(order[:count]))


def strength(found: Measured, linear: nn.Linear) -> Tensor:
    """Return Wanda's strength of each weight, of the matrix's shape."""
    inputs = (found.squares[id(linear)] / found.tokens).sqrt()
    return linear.weight.detach().abs() * inputs.to(linear.weight.dtype)


def neurons(found: Measured, backbone: Any) -> list[Tensor]:
    """Return how much each neuron of each layer's feed-forward block adds to what stands behind it."""
    return [strength(found, feed_forward(layer).fall).norm(dim=0) for layer in layers_of(backbone)]


def groups(found: Measured, backbone: Any) -> list[Tensor]:
    """Return how much each group of heads with common keys adds, [groups] a layer.

    Raises:
        ModelError: as :func:`fedllm.models.compression.structure.groups_of`.
    """
    count, _, _ = groups_of(backbone)
    each = [strength(found, layer.self_attn.o_proj).norm(dim=0) for layer in layers_of(backbone)]
    return [columns.view(count, -1).norm(dim=1) for columns in each]
