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
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm.data import Batch
from fedllm.directions import Direction, Kind, add_scaled, flat
from fedllm.models import Model
from fedllm.tensors import Tensors

__all__ = [
    "Estimator",
    "Loss",
    "Slopes",
    "antithetic",
    "batch_loss",
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


def expected_cosine(directions: int, parameters: int) -> float:
    """Cosine to expect between the true gradient and a mean of forward gradients.

    The mean of N forward gradients has squared norm ||g||^2 (1 + (p - 1) / N) in expectation.

    >>> round(expected_cosine(200, 3461), 2)
    0.23
    """
    return math.sqrt(directions / (directions + parameters - 1))


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
            smaller steps drown in the rounding of float32 losses.

    Returns:
        Slopes, shape (P,).
    """
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in kept.values()))
    step = radius * (norm or 1.0) / math.sqrt(sum(tensor.numel() for tensor in kept.values()))

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
    _prepare_forward_mode()
    names = sorted(tensors)
    values = {name: tensors[name].detach() for name in names}
    sizes = [values[name].numel() for name in names]

    def along(tangent: dict[str, torch.Tensor]) -> torch.Tensor:
        slope: torch.Tensor = torch.func.jvp(lambda w: loss(w).float(), (values,), (tangent,))[1]
        return slope

    found: list[torch.Tensor] = []
    with torch.no_grad():
        for start in range(0, len(directions), parallel):
            rows = np.stack([flat(v, sum(sizes), kind) for v in directions[start : start + parallel]])
            parts = torch.split(torch.from_numpy(rows), sizes, dim=1)
            tangents = {
                name: part.reshape(len(rows), *values[name].shape).to(values[name].dtype)
                for name, part in zip(names, parts, strict=True)
            }
            if len(rows) == 1:
                found.append(along({name: tangent[0] for name, tangent in tangents.items()}).reshape(1))
            else:
                found.append(torch.func.vmap(along)(tangents))
    return torch.cat(found).numpy() if found else np.empty(0, dtype=np.float32)


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
    it; here they are made for ``rows`` tokens at a time and forgotten.

    Args:
        model: its trained tensors are the function's argument, the rest is fixed.
        batch: the texts.
        rows: tokens whose logits exist at once, of a causal model.
    """
    ids, mask, labels = (tensor.to(model.device) for tensor in batch)
    inputs = {"input_ids": ids, "attention_mask": mask}

    def classified(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output = torch.func.functional_call(model.module, dict(values), kwargs={**inputs, "labels": labels})
        value: torch.Tensor = output.loss
        return value

    if model.task != "causal":
        return classified
    decoder = model.module.backbone.get_output_embeddings()  # type: ignore[operator]  # transformers' own
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    predicted = int((targets != -100).sum())

    def predicting(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        decoder.forward = lambda hidden: hidden
        try:
            output = torch.func.functional_call(model.module, dict(values), kwargs=inputs)
        finally:
            del decoder.forward
        hidden = output.logits.flatten(0, 1)
        total: torch.Tensor = hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(targets), rows):
            logits = decoder(hidden[first : first + rows]).float()
            some = targets[first : first + rows]
            total = total + functional.cross_entropy(logits, some, ignore_index=-100, reduction="sum")
        return total / max(predicted, 1)

    return predicting
