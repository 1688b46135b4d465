"""Forward gradients: slopes of a loss along random directions, without a backward pass.

For a direction v the forward gradient is (grad f . v) v (Baydin et al., 2022; FwdLLM, USENIX ATC 2024,
section 3): unbiased when E[v v'] = I. Only the scalar grad f . v has to be measured and sent. Two ways to
measure it stand here: ``jvp`` is exact and takes many directions at once, ``antithetic`` is a difference of
two plain evaluations and needs no more memory than one.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm.data.tokens import Batch
from fedllm.models.functional import call
from fedllm.models.model import Model
from fedllm.models.network import Network
from fedllm.models.vocabulary import Ending, ending_of, loss_ahead, output_matrix
from fedllm.tasks.base import PerToken
from fedllm.tensors import Tensors
from strategies.forward.directions import Direction, Kind, add_scaled, flat, hadamard_rows

__all__ = [
    "Estimator",
    "Loss",
    "Slopes",
    "antithetic",
    "batch_loss",
    "derivatives",
    "expected_cosine",
    "jvp",
    "passes",
    "settled",
    "slopes",
]

Estimator = Literal["jvp", "antithetic"]
Loss = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""A loss (0-dim) as a function of the trainable tensors; everything else about it is fixed."""
Slopes = npt.NDArray[np.float32]
"""grad f . v for each of P directions, shape (P,)."""
_LEAST_SIZE = 5e-3
"""Root mean square below which tensors are no measure of a step: much of what adapters add starts at zero."""


def expected_cosine(directions: int, parameters: int, kind: Kind = "rademacher") -> float:
    """Cosine to expect between the true gradient and a mean of forward gradients.

    The mean of N forward gradients has squared norm ||g||^2 (1 + (p - 1) / N) in expectation, and less if
    they are orthogonal: see :mod:`strategies.forward.directions`.

    >>> round(expected_cosine(200, 3461), 2)
    0.23
    >>> expected_cosine(256, 210, "orthogonal")
    1.0
    """
    error = (parameters - 1) / directions
    if kind == "orthogonal":
        rows = hadamard_rows(parameters)
        error *= max(rows - directions, 0) / (rows - 1)
    return 1.0 / math.sqrt(1.0 + error)


def passes(directions: int, estimator: Estimator, parallel: int) -> int:
    """Forward passes that ``directions`` slopes cost: two each, or one each and one primal per batch."""
    return 2 * directions if estimator == "antithetic" else directions + -(-directions // parallel)


@functools.cache
def _prepare_forward_mode() -> None:
    """Let torch compile its forward-mode rules once, without its own deprecation warning about how."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        with torch.autograd.forward_ad.dual_level():
            torch.autograd.forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


@contextmanager
def settled(module: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off, record no graph, and use the attention that has a forward derivative.

    Without this a difference of two losses would measure the noise of dropout, not the slope; torch's
    flash and memory-efficient attention have no forward derivative.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for part in training:
            part.training = True


def antithetic(
    loss: Loss,
    tensors: Tensors,
    directions: Sequence[Direction],
    *,
    kind: Kind = "rademacher",
    radius: float = 1e-2,
) -> Slopes:
    """Measure slopes as (f(w + h v) - f(w - h v)) / 2h, with an error of O(h^2).

    The tensors are moved in place and put back from a copy, bit for bit, whatever ``loss`` raises. Adding
    h v, subtracting 2 h v and adding h v again (as MeZO does) would leave rounding errors behind.

    Args:
        loss: called with ``tensors`` themselves; may also read them where they live in a module.
        tensors: float32, contiguous; the values at which the slope is taken.
        directions: P names.
        kind: distribution of the entries.
        radius: ||h v|| / ||w||, in (0, 1). Near 1e-2 the error against ``jvp`` is least (.04-.1 %);
            smaller steps drown in the rounding of float32 losses. Tensors that are all but zero are
            taken to have a root mean square of 0.005.

    Returns:
        Slopes, shape (P,).
    """
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in kept.values()))
    root_mean_square = norm / math.sqrt(sum(tensor.numel() for tensor in kept.values()))
    step = radius * max(root_mean_square, _LEAST_SIZE)

    def evaluate(direction: Direction, scale: float) -> float:
        try:
            add_scaled(tensors, direction, scale, kind)
            return float(loss(tensors).float())
        finally:
            for name, tensor in kept.items():
                tensors[name].copy_(tensor)

    with torch.no_grad():
        return np.array(
            [(evaluate(v, step) - evaluate(v, -step)) / (2.0 * step) for v in directions], dtype=np.float32
        )


def jvp(
    loss: Loss,
    tensors: Tensors,
    directions: Sequence[Direction],
    *,
    kind: Kind = "rademacher",
    parallel: int = 8,
) -> Slopes:
    """Measure slopes exactly by forward-mode differentiation, ``parallel`` directions at a time.

    ``vmap`` carries the tangents of a batch side by side while the primal is computed once, so that a
    batch of n costs about n + 1 passes in large matrix products, and the activations of n + 1.

    Args:
        loss: a function of the tensors it is given (``torch.func.functional_call`` makes one of a module).
        tensors: float32; the values at which the slope is taken.
        directions: P names.
        kind: distribution of the entries.
        parallel: directions per batch; memory grows with it.

    Returns:
        Slopes, shape (P,).
    """
    found = [
        derivatives(loss, tensors, directions[start : start + parallel], kind)
        for start in range(0, len(directions), parallel)
    ]
    return torch.cat(found).cpu().numpy() if found else np.empty(0, dtype=np.float32)


def derivatives(
    loss: Loss, tensors: Tensors, directions: Sequence[Direction], kind: Kind = "rademacher"
) -> torch.Tensor:
    """Return the slopes of a batch of directions, shape (n,), all of them at a time; see :func:`jvp`."""
    _prepare_forward_mode()
    names = sorted(tensors)
    values = {name: tensors[name].detach() for name in names}
    sizes = [values[name].numel() for name in names]

    def along(tangent: dict[str, torch.Tensor]) -> torch.Tensor:
        slope: torch.Tensor = torch.func.jvp(lambda w: loss(w).float(), (values,), (tangent,))[1]
        return slope

    rows = np.stack([flat(v, sum(sizes), kind) for v in directions])
    parts = torch.split(torch.from_numpy(rows), sizes, dim=1)
    tangents = {
        name: part.reshape(len(rows), *values[name].shape).to(values[name])
        for name, part in zip(names, parts, strict=True)
    }
    with torch.no_grad():
        if len(rows) == 1:
            return along({name: tangent[0] for name, tangent in tangents.items()}).reshape(1)
        several: torch.Tensor = torch.func.vmap(along)(tangents)
        return several


def slopes(
    estimator: Estimator,
    loss: Loss,
    tensors: Tensors,
    directions: Sequence[Direction],
    *,
    kind: Kind = "rademacher",
    radius: float = 1e-2,
    parallel: int = 8,
) -> Slopes:
    """Measure slopes with the estimator of this name."""
    if estimator == "jvp":
        return jvp(loss, tensors, directions, kind=kind, parallel=parallel)
    return antithetic(loss, tensors, directions, kind=kind, radius=radius)


def batch_loss(model: Model, batch: Batch, rows: int = 64) -> Loss:
    """Return the loss on one batch as a function of the trained tensors.

    A causal model's logits are the largest tensor there is (vocabulary times tokens), and a tangent doubles
    it; here they are made for ``rows`` tokens at a time and forgotten, unless the model does to them what
    :func:`fedllm.models.vocabulary.ending_of` does not know.

    Args:
        model: its trained tensors are the function's argument, the rest is fixed.
        batch: the texts.
        rows: tokens whose logits exist at once, of a causal model.
    """
    here = batch.to(model.device)
    inputs = {**here.inputs(), "labels": here.labels}
    large = model.module.pooling == "causal" and isinstance(model.task, PerToken)
    ending = None
    if large:
        with settled(model.module):
            ending = ending_of(model.module)
    part = _Loss(model.module, ending, rows)

    def loss(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        named = {f"network.{name}": value for name, value in values.items()}
        value: torch.Tensor = call(part, named, **inputs)
        return value

    return loss


class _Loss(nn.Module):
    """A network's loss as a module, because ``call`` swaps tensors for one module's call only.

    Args:
        network: the model.
        ending: what it does behind its output matrix; without one all logits are made at once, by itself.
        rows: tokens whose logits are made at a time.
    """

    def __init__(self, network: Network, ending: Ending | None, rows: int) -> None:
        super().__init__()
        self.network, self.ending, self.rows = network, ending, rows
        matrix = output_matrix(network)
        self.fixed = matrix is not None and not any(value.requires_grad for value in matrix.parameters())

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        if self.ending is None:
            whole: torch.Tensor = self.network(labels=labels, **inputs).loss
            return whole
        return loss_ahead(self.network, self.ending, labels, inputs, self.rows, fixed=self.fixed)
