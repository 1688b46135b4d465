"""A small student out of a large base model: some of its layers, and optionally a narrower width.

Everything is a function of the base model's weights, so every node derives the same student for itself and
nothing of it needs to be sent before the first update.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.errors import ModelError
from fedllm.models.anatomy import layers as layers_of
from fedllm.models.anatomy import plain
from fedllm.models.anatomy import width as width_of
from fedllm.models.compression.structure import keep
from fedllm.models.model import Model

__all__ = [
    "check_pair",
    "depth",
    "freeze_embeddings",
    "keep_layers",
    "narrow",
    "principal_directions",
    "width",
]


def depth(model: Model) -> int:
    """Return the number of transformer layers."""
    return len(layers_of(model.module.backbone))


def width(model: Model) -> int:
    """Return the width of the hidden states."""
    return width_of(model.module.backbone)


def keep_layers(model: Model, layers: tuple[int, ...]) -> None:
    """Drop every transformer layer but these, in place; the model's configuration follows.

    Args:
        model: without an adapter.
        layers: which layers stay, counted from 0, in ascending order.

    Raises:
        ModelError: a layer does not exist, repeats or is out of order.
    """
    keep(model.module.backbone, layers, model.config.model.name)


def freeze_embeddings(model: Model) -> None:
    """Stop training of every table of tokens, positions or types: embeddings, and the output matrix."""
    tables = [module for module in model.module.modules() if isinstance(module, nn.Embedding)]
    for table in [*tables, plain(model.module.backbone).get_output_embeddings()]:
        if table is not None:
            table.weight.requires_grad_(False)


def check_pair(teacher: Model, student: Model, *, attention: bool) -> None:
    """Refuse a teacher and a student that cannot learn from each other on the same batch.

    Args:
        teacher: the one that stays.
        student: the one that travels.
        attention: their attention maps are compared.

    Raises:
        ModelError: tokenizers, tasks, classes or (where maps are compared) numbers of heads differ.
    """
    pair = f"teacher {teacher.config.model.name} and student {student.config.model.name}"
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise ModelError(
            f"{pair} read text through different tokenizers, so their token predictions and hidden states "
            "cannot be compared; take a student with the teacher's own tokenizer"
        )
    if (teacher.task.name, teacher.labels) != (student.task.name, student.labels):
        raise ModelError(f"{pair} predict different things; both must have the same task and classes")
    adapter = getattr(teacher.module.backbone, "active_peft_config", None)
    if attention and getattr(adapter, "is_prompt_learning", False):
        raise ModelError(
            f"tuning.peft = {teacher.config.tuning.peft!r} puts tokens of its own before the text, so its "
            "attention maps have another shape than the student's; set fedkd.attention = false"
        )
    if depth(student) > depth(teacher):
        raise ModelError(
            f"{pair}: the student has {depth(student)} layers, the teacher only {depth(teacher)}"
        )
    heads = [int(_settings(model).num_attention_heads) for model in (teacher, student)]
    if attention and heads[0] != heads[1]:
        raise ModelError(
            f"{pair} have {heads[0]} and {heads[1]} attention heads, whose maps cannot be compared; "
            "set fedkd.attention = false"
        )


def principal_directions(model: Model, size: int) -> Tensor:
    """Return the ``size`` leading right singular vectors of the token embeddings: [width, size], orthonormal.

    The token embeddings are the first thing written to the residual stream, so these are the directions
    in which most of what the layers read lies.
    """
    table = plain(model.module.backbone).get_input_embeddings().weight.detach().double()
    # eigh sorts in ascending order; the Gram matrix spares an SVD as tall as the vocabulary.
    directions: Tensor = torch.linalg.eigh(table.T @ table).eigenvectors.flip(1)[:, :size]
    return directions.contiguous()


def narrow(model: Model, size: int) -> None:
    """Reduce the width of a BERT encoder to ``size``, in place, by singular value decompositions.

    The residual stream is projected on the leading directions P of :func:`principal_directions`. Within each
    attention head the products that matter, (Wq P)' (Wk P) and P' Wo Wv P with their biases, are replaced by
    their best approximations of the narrower rank. Of each feed-forward layer the neurons with the
    largest product of input and output norms stay, as many as the width's share.

    Args:
        model: a BERT-like encoder without an adapter; its number of heads stays.
        size: the new width, a multiple of the number of heads.

    Raises:
        ModelError: another architecture, or a size that does not divide into heads.
    """
    encoder, settings = plain(model.module.backbone), _settings(model)
    heads, old = int(settings.num_attention_heads), int(settings.hidden_size)
    if settings.model_type != "bert" or model.module.head is None:
        raise ModelError(
            f"fedkd.width works for BERT encoders with mean or cls pooling; {model.config.model.name} is "
            f"{settings.model_type!r} with {model.module.pooling!r}: choose fewer layers instead"
        )
    if not 0 < size < old or size % heads:
        raise ModelError(f"fedkd.width = {size} must be a multiple of {heads} heads below {old}")
    basis = principal_directions(model, size)
    inner = int(settings.intermediate_size) * size // old
    with torch.no_grad():
        for module in encoder.embeddings.modules():
            if isinstance(module, nn.Embedding):
                _set(module, module.weight.double() @ basis)
                module.embedding_dim = size
        _narrow_norm(encoder.embeddings.LayerNorm, basis)
        for layer in layers_of(model.module.backbone):
            _narrow_attention(layer.attention, basis, heads)
            _narrow_feed_forward(layer.intermediate.dense, layer.output, basis, inner)
        # Pooled vectors have length sqrt(width) at either width, see Network.pool.
        _set_linear(model.module.head, model.module.head.weight.double() @ basis, model.module.head.bias)
    settings.hidden_size, settings.intermediate_size = size, inner


def _narrow_attention(attention: Any, basis: Tensor, heads: int) -> None:
    inner, output = attention.self, attention.output
    size, rank = basis.shape[1], basis.shape[1] // heads
    query, key, value = (
        torch.cat([part.weight.double() @ basis, part.bias.double()[:, None]], 1).chunk(heads)
        for part in (inner.query, inner.key, inner.value)
    )
    back = (basis.T @ output.dense.weight.double()).chunk(heads, dim=1)
    # Scores are divided by the square root of the head's size, which shrinks too.
    temper = math.sqrt(rank / query[0].shape[0])
    looks = [_best(q.T @ k * temper, rank) for q, k in zip(query, key, strict=True)]
    moves = [_best(o @ v, rank) for o, v in zip(back, value, strict=True)]
    for part, rows in (
        (inner.query, torch.cat([left.T for left, _ in looks])),
        (inner.key, torch.cat([right for _, right in looks])),
        (inner.value, torch.cat([right for _, right in moves])),
    ):
        _set_linear(part, rows[:, :size], rows[:, size])
    _set_linear(output.dense, torch.cat([left for left, _ in moves], 1), basis.T @ output.dense.bias.double())
    _narrow_norm(output.LayerNorm, basis)
    inner.attention_head_size, inner.all_head_size, inner.scaling = rank, size, rank**-0.5


def _narrow_feed_forward(rise: Any, output: Any, basis: Tensor, inner: int) -> None:
    fall = output.dense
    strength = rise.weight.norm(dim=1) * fall.weight.norm(dim=0)
    chosen = strength.topk(inner).indices.sort().values
    _set_linear(rise, rise.weight[chosen].double() @ basis, rise.bias[chosen])
    _set_linear(fall, basis.T @ fall.weight[:, chosen].double(), basis.T @ fall.bias.double())
    _narrow_norm(output.LayerNorm, basis)


def _narrow_norm(norm: Any, basis: Tensor) -> None:
    """Gains are averaged with the weights that the old coordinates have in the new; offsets are projected."""
    _set(norm, basis.square().T @ norm.weight.double())
    norm.bias = nn.Parameter((basis.T @ norm.bias.double()).float())
    norm.normalized_shape = (basis.shape[1],)


def _best(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split a matrix into two factors of ``rank`` that share its singular values evenly."""
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _set_linear(linear: Any, weight: Tensor, bias: Tensor) -> None:
    _set(linear, weight)
    linear.bias = nn.Parameter(bias.detach().float())
    linear.out_features, linear.in_features = weight.shape


def _set(module: Any, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight.float().contiguous())


def _settings(model: Model) -> Any:
    return plain(model.module.backbone).config
