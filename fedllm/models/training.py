"""Local training: the loop that every method with backpropagation shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fedllm.config import TrainingConfig
from fedllm.data.tokens import Batch, Tokens
from fedllm.errors import RunFailed
from fedllm.tensors import Tensors, norm_of

__all__ = ["descend", "drawn", "learning_rate", "minibatches", "only", "optimizer_of", "stride", "walk"]

T = TypeVar("T")


def drawn(
    texts: int, batch_size: int, steps: int, generator: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the texts of ``steps`` batches: whole shuffled passes over all, each text once per pass.

    A pass's last batch is short where the batch size does not divide the number of texts.

    >>> [len(batch) for batch in drawn(5, 2, 4, np.random.default_rng(0))]
    [2, 2, 1, 2]
    """
    order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if not len(order):
            order = generator.permutation(texts)
        yield order[:batch_size]
        order = order[batch_size:]


def minibatches(
    tokens: Tokens, batch_size: int, steps: int, generator: np.random.Generator
) -> Iterator[Batch]:
    """Yield ``steps`` batches, as :func:`drawn`."""
    for indices in drawn(len(tokens), batch_size, steps, generator):
        yield tokens.batch(indices)


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Learning rate at ``progress`` in [0, 1].

    >>> learning_rate(TrainingConfig(learning_rate=1.0, schedule="cosine"), 0.5)
    0.5
    """
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": (1.0 + math.cos(math.pi * progress)) / 2.0,
    }[config.schedule]
    return config.learning_rate * factor


def optimizer_of(
    kind: Literal["adamw", "sgd"], parameters: Iterable[torch.nn.Parameter], rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return a fresh local optimiser that takes its steps in one pass over memory.

    >>> optimizer_of("sgd", [torch.nn.Parameter(torch.zeros(1))], 0.5, 0.0).param_groups[0]["lr"]
    0.5
    """
    # Unfused, AdamW walks through memory once per operation: 0.20 s a step for all of MiniLM, not 0.04.
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=rate, weight_decay=weight_decay, fused=True)


def descend(
    parameters: Sequence[torch.nn.Parameter],
    loss: Callable[[Batch], torch.Tensor],
    batches: Iterable[Batch],
    config: TrainingConfig,
    progress: float = 0.0,
) -> list[float]:
    """Minimise ``loss`` over ``parameters``, one optimiser step per batch.

    Args:
        parameters: changed in place.
        loss: maps a batch to a 0-dim tensor.
        batches: one per step.
        config: see :func:`walk`.
        progress: likewise.

    Returns:
        The loss of each batch, before its step.

    Raises:
        RunFailed: a loss is not finite.
    """

    def differentiate(batch: Batch) -> float:
        value = loss(batch)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return float(value.detach())

    return walk(parameters, differentiate, batches, config, progress)


def walk(
    parameters: Sequence[torch.nn.Parameter],
    differentiate: Callable[[T], float],
    steps: Iterable[T],
    config: TrainingConfig,
    progress: float = 0.0,
) -> list[float]:
    """Take optimiser steps along gradients, however these are made.

    The FedProx term mu/2 ||w - w_0||^2 (Li et al., MLSys 2020, eq. 2) pulls towards the values that the
    parameters have at the call; its gradient is added directly, so that reported losses stay comparable.

    Args:
        parameters: changed in place.
        differentiate: adds the gradients of one step to the parameters' own, and returns its loss.
        steps: what each step is made of.
        config: optimiser, learning rate, decay, clipping, proximal coefficient.
        progress: share of the run that is done, in [0, 1]; drives the schedule.

    Returns:
        What ``differentiate`` returned.

    Raises:
        RunFailed: a loss is not finite.
    """
    rate = learning_rate(config, progress)
    optimizer = optimizer_of(config.optimizer, parameters, rate, config.weight_decay)
    anchors = [p.detach().clone() for p in parameters] if config.proximal else []
    losses: list[float] = []
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        losses.append(differentiate(step))
        if not math.isfinite(losses[-1]):
            raise RunFailed(f"the loss became {losses[-1]}; lower training.learning_rate = {rate:g}")
        for parameter, anchor in zip(parameters, anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=config.proximal)
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
    return losses


@contextmanager
def only(
    parameters: Mapping[str, torch.nn.Parameter], names: Container[str]
) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Freeze all but ``names`` for a while: what is not trained needs no gradient."""
    frozen = [parameter for name, parameter in parameters.items() if name not in names]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield {name: parameter for name, parameter in parameters.items() if name in names}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def stride(config: TrainingConfig, tensors: Tensors) -> float:
    """How long an update of local training is, about: what bounds it before any has been seen.

    AdamW moves each value by about the learning rate in each step (Kingma & Ba, ICLR 2015, section 2.1), plus
    the decay. A step of SGD is as long as its gradient: where that is clipped so is the step; elsewhere the
    length of the weights themselves stands in.

    Args:
        config: the clients' local training.
        tensors: the global tensors from which they start.
    """
    weights = norm_of(tensors)
    distance = config.learning_rate * config.local_steps
    if config.optimizer == "adamw":
        values = sum(t.numel() for t in tensors.values())
        return distance * (math.sqrt(values) + config.weight_decay * weights)
    return distance * config.max_grad_norm if config.max_grad_norm else max(weights, 1.0)
