"""Before the first round: does all that is to be trained reach the loss, the way it will be trained?

A tensor can be trained in name only: a head that the forward pass goes around, a gate of a layer that is
never asked, weights behind an operation without a derivative. Such a run finishes and has learned nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedllm.data.tokens import Batch
from fedllm.errors import ModelError
from fedllm.models.model import Model
from strategies.forward.directions import Direction, flat
from strategies.forward.slopes import Estimator, batch_loss, settled, slopes
from strategies.forward.vectors import entries

__all__ = ["require_apart", "require_gradients", "require_slopes", "routed", "try_probes", "undone"]

_STEPS = 4
"""Steps after which every tensor must have had a gradient. A factor has none while its partner is zero:
LoRA's A waits for B, and where three factors are multiplied the last one waits for two steps."""
_STEP_SIZE = 1e-2
_NUDGE = 1.0
"""How far an adapter is moved to see at what it looks."""
_APART = {True: 1e-3, False: 0.02}
"""Relative difference of scores by which it is seen, in float32 and in less. The same shapes are rounded
alike, but experts get texts beside each other in shapes that the texts decide."""
_PROBES = (_STEP_SIZE, 1.0)
"""How far a tensor is moved to see whether the loss notices."""
_INSTEAD = '; take the estimator "antithetic"'
_DISAGREEMENT = 0.05
"""Of a slope with the gradient's component, in gradient norms, that ``jvp`` may have by rounding."""


@contextmanager
def undone(*models: Model) -> Iterator[None]:
    """Undo, bit for bit, what happens inside to trained tensors, gradients, modes and random numbers."""
    parameters = [p for model in models for p in model.trainable().values()]
    kept = [p.detach().clone() for p in parameters]
    modes = [(part, part.training) for model in models for part in model.module.modules()]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def require_apart(model: Model, batch: Batch) -> None:
    """See that an adapter looks at nothing but a text's own tokens, and in a causal model at none to come.

    Adapters begin as if they were not there, so theirs are moved first; all is undone.

    Args:
        model: with an adapter on it.
        batch: at least one text.

    Raises:
        ModelError: scores of a text depend on the texts beside it, or on tokens that are to be predicted.
    """
    config, network = model.config, model.module
    apart = _APART[config.model.dtype == "float32"]
    here = batch.to(model.device)

    def look(ids: torch.Tensor) -> torch.Tensor:
        """Return the first row's scores; the same shapes, and so the same rounding, at every call."""
        extra = {name: tensor[:1].repeat_interleave(2, 0) for name, tensor in here.extra.items()}
        mask = here.attention_mask[:1].expand(2, -1)
        return network(ids, mask, **extra).logits[0].float()  # type: ignore[no-any-return]

    def differ(one: torch.Tensor, two: torch.Tensor) -> bool:
        return bool((one - two).abs().max() > apart * one.abs().max())

    with undone(model), _rows_alone(network), torch.no_grad():
        network.eval()
        for parameter in model.trainable().values():
            parameter.add_(_NUDGE * torch.randn_like(parameter))
        text = here.input_ids[:1]
        twice = look(text.expand(2, -1))
        if differ(twice, look(torch.cat([text, (text == 0).long()]))):
            raise ModelError(
                f"tuning.peft = {config.tuning.peft!r} makes the scores of a text depend on the texts beside "
                "it in a batch; take another one"
            )
        last = int(here.attention_mask[0].sum()) - 1
        if network.pooling == "causal" and last > 0:
            other = text.clone()
            other[0, last] = 0 if other[0, last] else 1
            if differ(twice[:last], look(other.expand(2, -1))[:last]):
                raise ModelError(
                    f"tuning.peft = {config.tuning.peft!r} lets the model see the tokens that it is to "
                    "predict; take another one"
                )


@contextmanager
def _rows_alone(network: nn.Module) -> Iterator[None]:
    """Let an eight-bit base compute each row by itself: what it takes for outliers, all rows decide."""
    parts = [getattr(part, "state", None) for part in network.modules()]
    states: list[Any] = [state for state in parts if hasattr(state, "threshold")]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def routed(name: str) -> bool:
    """Whether a tensor is of an expert, which sees those texts only that a router sends to it."""
    return "expert" in name


def require_gradients(parameters: Mapping[str, nn.Parameter], loss: Callable[[], torch.Tensor]) -> list[str]:
    """Take a few steps against the gradient until every parameter has had one; call it under :func:`undone`.

    Args:
        parameters: all that is trained, by name; changed in place.
        loss: 0-dim, of the same texts at every call.

    Returns:
        A sentence on experts that no text was sent to, if there are any.

    Raises:
        ModelError: nothing is trained, a loss or gradient is not finite, or a parameter never has a gradient
            other than zero; names the first.

    >>> w, idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    >>> require_gradients({"w": w}, lambda: (w * w).sum())
    []
    >>> require_gradients({"w": w, "idle": idle}, lambda: (w * w).sum())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedllm.errors.ModelError: idle gets no gradient, 1 of 2 tensors would be trained in name only; take ...
    """
    missing = _without_gradient(parameters, loss, strictly=True)
    return _require_none(missing, parameters, "gets no gradient")


def _require_none(missing: set[str], parameters: Mapping[str, nn.Parameter], what: str) -> list[str]:
    """Refuse tensors that are trained in name only; of experts whose siblings are trained say so only."""
    trained = {_any_expert(name) for name in parameters if routed(name) and name not in missing}
    waiting = {name for name in missing if routed(name) and _any_expert(name) in trained}
    if idle := missing - waiting:
        raise ModelError(
            f"{min(idle)} {what}, {len(idle)} of {len(parameters)} tensors would be trained in name only; "
            "take another tuning.peft or other tuning.targets"
        )
    if not waiting:
        return []
    return [
        f"no text of the rehearsal was sent to the experts of {len(waiting)} of {len(parameters)} trained "
        f"tensors, such as {min(waiting)}: they learn only where the router sends clients' texts to them"
    ]


def _any_expert(name: str) -> str:
    """Name the same tensor of all experts of one layer alike."""
    layer, expert, place = name.partition("expert")
    return layer + expert + re.sub(r"\d+", "*", place)


def _without_gradient(
    parameters: Mapping[str, nn.Parameter], loss: Callable[[], torch.Tensor], *, strictly: bool
) -> set[str]:
    """Return the names of what has no gradient other than zero in any of a few steps.

    Raises:
        ModelError: nothing is trained, or, ``strictly``, the first loss or gradient is not finite.
    """
    if not parameters:
        raise ModelError(
            "nothing is trained: the adapter has put no tensor anywhere; take another tuning.peft or other "
            "tuning.targets"
        )
    missing = set(parameters)
    for step in range(_STEPS):
        for parameter in parameters.values():
            parameter.grad = None
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if step == 0 and strictly:
            _require_finite(value, gradients)
        # What is no number, after steps that went too far, shows nothing.
        finite = {name: gradient.nan_to_num(0.0, 0.0, 0.0) for name, gradient in gradients.items()}
        missing -= {name for name, gradient in finite.items() if gradient.any()}
        if not missing:
            break
        with torch.no_grad():
            for name, gradient in finite.items():
                parameters[name].sub_(gradient.sign(), alpha=_STEP_SIZE)
    return missing


def _require_finite(value: torch.Tensor, gradients: Mapping[str, torch.Tensor]) -> None:
    odd = sorted(name for name, gradient in gradients.items() if not gradient.isfinite().all())
    if not math.isfinite(float(value.detach())):
        what = f"the loss is {float(value.detach())}"
    elif odd:
        what = f"the gradient of {odd[0]} is not finite"
    else:
        return
    raise ModelError(
        f'{what} before any training; take model.dtype = "float32", and a model whose weights are sound'
    )


def try_probes(model: Model, batch: Batch, radius: float) -> list[str]:
    """See that all that is trained moves the loss, and measure two antithetic slopes; undo every step.

    A gradient shows all tensors at once, where the model has one; what has none is moved to see.

    Args:
        model: with what is trained.
        batch: a few texts.
        radius: of the slopes.

    Returns:
        A sentence on experts that no text was sent to, if there are any.

    Raises:
        ModelError: a tensor moves no loss, or a slope is not finite.
    """
    parameters = model.trainable()

    def loss() -> torch.Tensor:
        return model.loss(batch)

    with undone(model):
        try:
            missing = _without_gradient(parameters, loss, strictly=False)
        except RuntimeError:  # without a backward pass, which probes do not need
            missing = set(parameters)
        with settled(model.module):
            still = _still(missing, parameters, loss)
        notes = _require_none(still, parameters, "moves no loss")
    with undone(model):
        require_slopes(model, batch, "antithetic", radius, 1)
    return notes


def _still(
    names: set[str], parameters: Mapping[str, nn.Parameter], loss: Callable[[], torch.Tensor]
) -> set[str]:
    """Return which of the named tensors may be moved without any change of the loss; moves them."""
    # Factors that start at zero would hide one another: all move first.
    for name in sorted(names):
        parameters[name].add_(_signs(parameters[name]), alpha=_STEP_SIZE)
    at, still = float(loss()), set()
    for name in sorted(names):
        parameter = parameters[name]
        kept, signs = parameter.detach().clone(), _signs(parameter)
        losses = [float(_moved(parameter, kept + size * signs, loss)) for size in _PROBES]
        parameter.copy_(kept)
        if all(value == at for value in losses):
            still.add(name)
    return still


def _moved(parameter: nn.Parameter, to: torch.Tensor, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    parameter.copy_(to)
    return loss()


def _signs(like: torch.Tensor) -> torch.Tensor:
    return torch.randint_like(like, 2) * 2 - 1


def require_slopes(model: Model, batch: Batch, estimator: Estimator, radius: float, parallel: int) -> None:
    """Measure two slopes as a forward-only method does and hold them against the gradient.

    Args:
        model: with what is trained.
        batch: a few texts.
        estimator: ``jvp``, which must agree with the gradient, or ``antithetic``, which need only be finite:
            on a base of half precision its differences are rough, but they are what was asked for.
        radius: of ``antithetic``.
        parallel: directions that ``jvp`` carries side by side.

    Raises:
        ModelError: a slope is not finite or, by ``jvp``, not the gradient's.
    """
    parameters = model.trainable()
    directions = [Direction(0, 0, 0, index) for index in range(2)]
    with settled(model.module):
        loss = batch_loss(model, batch)
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        try:
            found = slopes(estimator, loss, values, directions, radius=radius, parallel=parallel)
        except RuntimeError as met:
            if estimator == "antithetic":
                raise
            reason = " ".join(str(met).split())[:160]
            raise ModelError(f"it has no forward derivative ({reason} ...){_INSTEAD}") from met
        if not np.isfinite(found).all():
            raise ModelError(
                f"slopes by {estimator} are not finite before any training; take model.dtype = "
                '"float32", and a model whose weights are sound'
            )
        if estimator == "antithetic":
            return
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                model.loss(batch), list(parameters.values()), allow_unused=True, materialize_grads=True
            )
    gradient = torch.cat([part.reshape(-1) for part in gradients]).double().cpu().numpy()
    rows = np.stack([flat(direction, entries(parameters), "rademacher") for direction in directions])
    error = float(np.abs(found - rows @ gradient).max())
    if error > _DISAGREEMENT * float(np.linalg.norm(gradient)):
        raise ModelError(
            f"slopes by jvp miss the gradient by {error:.2g}, whose norm is "
            f"{float(np.linalg.norm(gradient)):.2g}: part of the model has no forward derivative{_INSTEAD}"
        )
