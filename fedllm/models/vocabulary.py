"""A language model's loss, its logits made for a few tokens at a time.

Logits are the largest tensor there is, vocabulary times tokens, and a backward pass keeps three more of the
kind. Nothing of that size outlives a part here: the gradient with respect to what the output matrix sees is
made with the loss, in the forward pass (as in Liger, Hsu et al., 2024), the same to rounding. In forward mode
it takes the place of a product with the output matrix for each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedllm.models.anatomy import plain
from fedllm.models.network import Network
from fedllm.tasks.base import IGNORED, PerToken

__all__ = [
    "Ending",
    "below",
    "ending_of",
    "loss_ahead",
    "loss_in_parts",
    "output_matrix",
    "rows_at_once",
]

Ending = Callable[[torch.Tensor], torch.Tensor]
"""What a model does to the output matrix's product to make logits of it, value by value."""
_VALUES = 1 << 22
"""Logits that exist at once: 16 MiB in float32."""
_LEAST_ROWS = 32
"""The output matrix is read once for each part: for fewer tokens that takes longer than the product."""


def rows_at_once(vocabulary: int) -> int:
    """Return for how many tokens logits are made at a time.

    >>> rows_at_once(49152), rows_at_once(256000)
    (85, 32)
    """
    return max(_LEAST_ROWS, _VALUES // vocabulary)


def output_matrix(network: Network) -> nn.Module | None:
    """Return what maps [..., width] to [..., vocabulary], adapters on it included."""
    backbone: Any = network.backbone
    found: nn.Module | None = backbone.get_output_embeddings()
    return found


def below(network: Network, matrix: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what the output matrix gets to see of the text's own tokens, [b, t, width].

    Args:
        network: the model.
        matrix: its :func:`output_matrix`.
        inputs: those of the network, without labels.
    """

    def stop(module: nn.Module, seen: tuple[torch.Tensor]) -> None:
        raise _Reached(seen[0])

    hook = matrix.register_forward_pre_hook(stop)
    try:
        network(**inputs)
    except _Reached as reached:
        hidden = reached.hidden
        return hidden[:, -inputs["input_ids"].shape[1] :] if network.pooling == "causal" else hidden
    finally:
        hook.remove()
    raise RuntimeError("the model returned logits without using its output matrix")


class _Reached(Exception):
    """The pass has come to the output matrix; what follows is done in parts."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def ending_of(network: Network) -> Ending | None:
    """Return what the model does behind its output matrix, ``None`` where that is none of what is known.

    Most do nothing, Gemma caps, Cohere and Granite scale. It is tried out: a pass in which known values stand
    in for the product.
    """
    matrix, given = output_matrix(network), []

    def mark(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        marks = torch.linspace(-40.0, 40.0, output.shape[-1], device=output.device)
        given.append(marks.to(output.dtype).expand_as(output))
        return given[-1]

    if matrix is None:
        return None
    token = torch.ones(1, 1, dtype=torch.int64, device=next(network.parameters()).device)
    answer = {"answer_ids": token} if network.pooling == "seq2seq" else {}
    modes = [part for part in network.modules() if part.training]
    hook = matrix.register_forward_hook(mark)
    try:
        with torch.no_grad():
            logits = network.eval()(input_ids=token, attention_mask=token, **answer).logits
    finally:
        hook.remove()
        for part in modes:
            part.training = True
    if len(given) != 1 or logits.shape[-1] != given[0].shape[-1]:
        return None
    want, marks = logits[:, -1:].float(), given[0][:, -1:]
    near = {torch.float32: 1e-5}.get(marks.dtype, 2e-2)
    for ending in _endings(plain(network.backbone)):
        if torch.allclose(ending(marks).float(), want, rtol=near, atol=near):
            return ending
    return None


def plainly(logits: torch.Tensor) -> torch.Tensor:
    """Most models' ending: nothing more."""
    return logits


def _capped(cap: float, logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits / cap) * cap


def _times(factor: float, logits: torch.Tensor) -> torch.Tensor:
    return logits * factor


def _over(divisor: float, logits: torch.Tensor) -> torch.Tensor:
    return logits / divisor


def _endings(model: Any) -> Iterator[Ending]:
    yield plainly
    known: dict[str, tuple[Callable[[float, torch.Tensor], torch.Tensor], ...]] = {
        "final_logit_softcapping": (_capped,),
        "logit_scale": (_times,),
        "logits_scaling": (_over, _times),
    }
    for name, makers in known.items():
        value = getattr(model, name, None) or getattr(model.config, name, None)
        if isinstance(value, int | float) and value:
            yield from (partial(make, float(value)) for make in makers)


def loss_in_parts(
    network: Network,
    ending: Ending,
    labels: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    rows: int | None = None,
) -> torch.Tensor:
    """Return the loss of a batch, 0-dim; its gradients are those of the network's own loss.

    Args:
        network: of a task that predicts tokens.
        ending: see :func:`ending_of`.
        labels: as the tokens' ``batch`` made them.
        inputs: the network's other inputs.
        rows: tokens whose logits exist at once; see :func:`rows_at_once`.
    """
    matrix, task, hidden, targets = _asked(network, labels, inputs)
    flat = targets.reshape(-1)
    if ending is plainly and _is_a_matrix(matrix) and _is_a_mean(task):
        weight: Any = matrix.weight
        hidden, flat = _known(hidden, flat)
        found: torch.Tensor = _CrossEntropy.apply(
            hidden, weight, matrix.bias, flat, rows or rows_at_once(len(weight))
        )  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return found

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return task.part(ending(matrix(hidden)).float(), targets)

    size = rows or rows_at_once(int(plain(network.backbone).config.vocab_size))
    parts = [
        checkpoint(part, *piece, use_reentrant=False)
        for piece in zip(torch.split(hidden, size), torch.split(flat, size), strict=True)
    ]
    return task.whole(parts, targets, inputs)


def loss_ahead(
    network: Network,
    ending: Ending,
    labels: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    rows: int,
    *,
    fixed: bool,
) -> torch.Tensor:
    """Return the loss of a batch, 0-dim, for derivatives in forward mode or for none.

    Its derivative along a change of what the output matrix sees is the product of that change with the
    loss's gradient there, which is made once for all directions.

    Args:
        network: of a task that predicts tokens.
        ending: see :func:`ending_of`.
        labels: as the tokens' ``batch`` made them.
        inputs: the network's other inputs.
        rows: tokens whose logits exist at once.
        fixed: the output matrix itself does not change; where it does, so do all logits.
    """
    matrix, task, hidden, targets = _asked(network, labels, inputs)
    flat = targets.reshape(-1)
    if fixed and ending is plainly and _is_a_matrix(matrix) and _is_a_mean(task):
        found: torch.Tensor = _CrossEntropyAhead.apply(
            *_known(hidden, flat), matrix.weight, matrix.bias, rows
        )  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return found
    parts = [
        task.part(ending(matrix(piece)).float(), wanted)
        for piece, wanted in zip(torch.split(hidden, rows), torch.split(flat, rows), strict=True)
    ]
    return task.whole(parts, targets, inputs)


def _asked(
    network: Network, labels: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, PerToken, torch.Tensor, torch.Tensor]:
    """Return the output matrix, the task, what the matrix sees [tokens, width], and the targets."""
    matrix, task = output_matrix(network), network.task
    assert matrix is not None
    assert isinstance(task, PerToken)
    return matrix, task, below(network, matrix, inputs).flatten(0, 1), task.targets(labels)


def _known(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leave out tokens that nothing is asked of: hidden states [n, width] and targets [n] of the others."""
    known = (targets != IGNORED).nonzero().squeeze(1)
    if len(known) == len(targets):
        return hidden, targets
    return hidden.index_select(0, known), targets[known]


def _is_a_matrix(module: nn.Module) -> bool:
    """Whether calling a module is multiplying by its weight, and no adapter or hook comes in between."""
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)


def _is_a_mean(task: PerToken) -> bool:
    kind = type(task)
    return kind.part is PerToken.part and kind.whole is PerToken.whole


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T + bias``, with its gradients made part by part."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        """Args: hidden [n, width], weight [vocabulary, width], bias [vocabulary], targets [n] from 0 on."""
        wanted = ctx.needs_input_grad
        down, matrix, offset = (
            torch.zeros_like(value) if need and value is not None else None
            for need, value in zip(wanted, (hidden, weight, bias), strict=False)
        )
        scale, total = 1.0 / max(len(targets), 1), hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(targets), rows):
            piece = slice(first, first + rows)
            lost, slopes = _part(hidden[piece], weight, bias, targets[piece], scale if any(wanted) else None)
            total += lost
            if slopes is None:
                continue
            if down is not None:
                torch.mm(slopes, weight, out=down[piece])
            if matrix is not None:
                matrix.addmm_(slopes.t(), hidden[piece])
            if offset is not None:
                offset += slopes.sum(0)
            del slopes  # before the next part's logits are made
        ctx.gradients = (down, matrix, offset)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        """Return what the forward pass has made, times the slope of whatever is made of the loss."""
        found = [g if g is None else g.mul_(slope) for g in ctx.gradients]
        del ctx.gradients  # scaled in place: no second time
        return (*found, None, None)


class _CrossEntropyAhead(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T + bias``, with its derivative in forward mode."""

    @staticmethod
    def forward(
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: int,
    ) -> torch.Tensor:
        """Args: hidden [n, width], targets [n] from 0 on, weight [vocabulary, width], bias [vocabulary]."""
        pieces = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        lost = [_part(piece, weight, bias, wanted, None)[0] for piece, wanted in pieces]
        return torch.stack(lost).sum() / max(len(targets), 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep what the derivative is made from."""
        *tensors, ctx.rows = inputs
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, change: torch.Tensor, *others: None) -> torch.Tensor:
        """Return the derivative along a change of ``hidden``; the rest has no tangent."""
        hidden, targets, weight, bias = ctx.saved_tensors
        gradient, scale = torch.empty_like(hidden), 1.0 / max(len(targets), 1)
        for first in range(0, len(targets), ctx.rows):
            piece = slice(first, first + ctx.rows)
            _, slopes = _part(hidden[piece], weight, bias, targets[piece], scale)
            assert slopes is not None
            torch.mm(slopes, weight, out=gradient[piece])
        return (change.float() * gradient.float()).sum()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        """Never reached, but asked for by torch: of several directions only the tangents are many."""
        raise NotImplementedError("losses at several values of the weights at a time")


def _part(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the summed cross-entropy and ``scale`` times its gradient with respect to the logits.

    All happens in the memory of the logits: log-sum-exp, softmax, softmax minus one at the target.
    """
    logits = functional.linear(hidden, weight, bias).float()
    at = targets.unsqueeze(1)
    logits -= logits.amax(1, keepdim=True)
    said = logits.gather(1, at)
    sums = logits.exp_().sum(1, keepdim=True)
    lost = (sums.log() - said).sum()
    if scale is None:
        return lost, None
    logits *= scale / sums
    logits.scatter_add_(1, at, torch.full_like(said, -scale))
    return lost, logits.to(weight.dtype)
