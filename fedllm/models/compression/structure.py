"""Whole parts of a model taken out of it: layers, neurons of feed-forward blocks, groups of heads.

What is left has the same sizes in every layer, which the configuration says: plain transformers loads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.errors import ModelError
from fedllm.models.anatomy import layers as layers_of
from fedllm.models.anatomy import plain

__all__ = ["FeedForward", "feed_forward", "groups_of", "keep", "keep_groups", "keep_neurons"]


def keep(backbone: Any, layers: tuple[int, ...], name: str) -> None:
    """Drop every transformer layer but these, in place; the model's configuration follows.

    Args:
        backbone: a transformers model without an adapter.
        layers: which layers stay, counted from 0, in ascending order.
        name: of the model, for people.

    Raises:
        ModelError: a layer does not exist, repeats or is out of order.
    """
    stack, settings = layers_of(backbone), plain(backbone).config
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < len(stack):
        raise ModelError(
            f"student layers {list(layers)} must be ascending numbers from 0 to {len(stack) - 1}: "
            f"{name} has {len(stack)} layers"
        )
    kept = [stack[index] for index in layers]
    _hand_over_bias(stack[0], kept[0])
    del stack[len(kept) :]
    for place, layer in enumerate(kept):
        stack[place] = layer
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    _keep_kinds(settings, layers)


def _hand_over_bias(first: nn.Module, begins: nn.Module) -> None:
    """Give the layer that now is the first what T5 keeps in its first one for all: the bias of distances."""
    for name, module in first.named_modules():
        bias = getattr(module, "relative_attention_bias", None)
        if isinstance(bias, nn.Embedding) and begins is not first:
            heir: Any = begins.get_submodule(name)
            heir.relative_attention_bias, heir.has_relative_attention_bias = bias, True


def _keep_kinds(settings: Any, layers: tuple[int, ...]) -> None:
    """Let the configuration say of the layers that stay what it said of them in their old places.

    Many models alternate kinds of layers (sliding and full attention, dense and expert blocks). A rule that
    counts places has no such setting: :func:`fedllm.models.readback.require_true` finds those.
    """
    for name, value in settings.to_dict().items():
        if isinstance(value, list) and "layer" in name and len(value) == settings.num_hidden_layers:
            setattr(settings, name, [value[index] for index in layers])
        elif name == "mlp_only_layers" and value:
            setattr(settings, name, [place for place, index in enumerate(layers) if index in value])
        elif name == "first_k_dense_replace" and value is not None:
            setattr(settings, name, sum(index < value for index in layers))
    settings.num_hidden_layers = len(layers)


class FeedForward(NamedTuple):
    """Linear layers of a feed-forward block: those that lead to its neurons, and the one that leads on."""

    rises: tuple[nn.Linear, ...]
    fall: nn.Linear


def feed_forward(layer: Any) -> FeedForward:
    """Find a layer's feed-forward block.

    Raises:
        ModelError: it is built neither as BERT's nor as Llama's.
    """
    if hasattr(layer, "intermediate") and hasattr(layer, "output"):
        return FeedForward((layer.intermediate.dense,), layer.output.dense)
    block: Any = getattr(layer, "mlp", None)
    if all(hasattr(block, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return FeedForward((block.gate_proj, block.up_proj), block.down_proj)
    raise ModelError(f"{type(layer).__name__} has a feed-forward block as neither BERT nor Llama has")


def keep_neurons(backbone: Any, strengths: list[Tensor], share: float) -> None:
    """Keep the strongest neurons of every feed-forward block, in place.

    Args:
        backbone: a transformers model without an adapter.
        strengths: of each layer's neurons, [neurons] each.
        share: that stays, in (0, 1); a multiple of 32 stays where there are as many.
    """
    settings = plain(backbone).config
    count = _rounded(share * int(settings.intermediate_size))
    for layer, strength in zip(layers_of(backbone), strengths, strict=True):
        block, chosen = feed_forward(layer), strength.topk(count).indices.sort().values
        for rise in block.rises:
            _take(rise, chosen, 0)
        _take(block.fall, chosen, 1)
    settings.intermediate_size = count


def _rounded(count: float) -> int:
    return max(1, int(count) // 32 * 32 or int(count))


def groups_of(backbone: Any) -> tuple[int, int, int]:
    """Return groups of attention heads that share keys and values, heads in each, and the width of a head.

    Raises:
        ModelError: plain transformers derives the width of heads from their number, as BERT's.
    """
    settings = plain(backbone).config
    if getattr(settings, "head_dim", None) is None or not hasattr(layers_of(backbone)[0], "self_attn"):
        raise ModelError(
            f"heads cannot go from a {settings.model_type}: the width of those that stay would be another"
        )
    groups = int(settings.num_key_value_heads)
    return groups, int(settings.num_attention_heads) // groups, int(settings.head_dim)


def keep_groups(backbone: Any, strengths: list[Tensor], share: float) -> None:
    """Keep the strongest groups of attention heads, in place.

    Args:
        backbone: a transformers model without an adapter.
        strengths: of the groups of each layer, [groups] each.
        share: that stays, in (0, 1).

    Raises:
        ModelError: as :func:`groups_of`.
    """
    groups, each, wide = groups_of(backbone)
    count = max(1, int(share * groups))
    for layer, strength in zip(layers_of(backbone), strengths, strict=True):
        attention, chosen = layer.self_attn, strength.topk(count).indices.sort().values
        few, many = _blocks(chosen, wide), _blocks(chosen, wide * each)
        _take(attention.q_proj, many, 0)
        _take(attention.k_proj, few, 0)
        _take(attention.v_proj, few, 0)
        _take(attention.o_proj, many, 1)
    settings = plain(backbone).config
    settings.num_key_value_heads, settings.num_attention_heads = count, count * each


def _blocks(chosen: Tensor, size: int) -> Tensor:
    return (chosen[:, None] * size + torch.arange(size)).flatten()


def _take(linear: nn.Linear, chosen: Tensor, side: int) -> None:
    """Keep rows (side 0) or columns (1) of a linear layer."""
    linear.weight = nn.Parameter(linear.weight.detach().index_select(side, chosen).contiguous())
    if side == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[chosen])
    linear.out_features, linear.in_features = linear.weight.shape
