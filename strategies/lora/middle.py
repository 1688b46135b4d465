"""Rule fed-sb: a small square factor R between two frozen outer ones, W + s B R A.

    setup      client k   G_k = dL/dW of each target layer on a few of its texts; sends the best rank r of
                          G_k / |G_k|, as factors
               server     B, A <- the leading r singular vectors of sum p_k G_k / |G_k|, sent once; R = 0
    round      client k   trains R_k [r, r] (and the head); sends its change
               server     R <- sum p_k R_k

B (sum p_k R_k) A is sum p_k B R_k A: the average is exact, for r^2 numbers per layer and round (Fed-SB,
Singhal et al., 2025; LoRA-SB, Ponkshe et al., 2024). Departures from the papers:

- They decompose the sign of the gradient, the first step of a sign descent, which one machine that holds all
  of it can do. Signs of a sum are not sums of signs, and a matrix of signs has no small factors to send:
  here it is the gradient itself, of length 1 from every client.
- They start R at the first step's singular values, as if a step had been taken. Here R starts at 0: training
  begins at the base model, and evaluation before it means that model.
- Their B and A are orthonormal. Here the rows of A have LoRA's own length and the columns of B that of
  sqrt(m / r), so that a step of AdamW moves W as far as LoRA's first one at the same learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fedllm.data.tokens import Batch, Tokens
from fedllm.errors import ModelError, RejectedReply
from fedllm.models.model import Model
from fedllm.models.training import minibatches
from fedllm.randomness import stream
from fedllm.tensors import Tensors
from strategies.base import Answer, Passes, Work
from strategies.lora.factors import A_ROW, Factors, norm, pairs, singular
from strategies.lora.layers import ADAPTER

__all__ = [
    "MIDDLE",
    "best",
    "directions",
    "folded",
    "gradients",
    "insert",
    "measure",
    "reject_longer",
    "texts",
]

MIDDLE = ".middle.default"
"""Ends the name of R; the last part is peft's name of the adapter, by which it is known for a part of it."""
_TEXTS = 64
"""Texts whose gradient decides the directions, at most."""
_SPARE, _PASSES = 8, 2
"""Columns beyond the rank, and passes over the matrix, of the randomised decomposition."""


def insert(layer: Any, name: str, seed: int) -> None:
    """Put R = 0 between the factors of a peft layer and freeze them; what they hold is for rehearsing only.

    Raises:
        ModelError: the layer does not multiply by A and then by B, or has fewer directions than the rank.
    """
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) and type(base).__name__ != "Conv1D":
        raise ModelError(
            f'lora.rule = "fed-sb" finds no weight matrix in {name}, a {type(base).__name__}: '
            "leave it out of tuning.targets"
        )
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    (rank, n), m = a.shape, b.shape[0]
    if rank > min(m, n):
        raise ModelError(
            f'lora.rule = "fed-sb" finds {min(m, n)} directions at most in {name}, which is {m} x {n}: '
            f"lower tuning.rank = {rank}"
        )
    middle = nn.Parameter(torch.zeros(rank, rank, device=a.device))
    layer.middle = nn.ParameterDict({ADAPTER: middle})
    layer.lora_A[ADAPTER].register_forward_hook(
        lambda module, inputs, output: nn.functional.linear(output, middle.to(output.dtype))
    )
    with torch.no_grad():
        for kind, factor, bound in (("A", a, n**-0.5), ("B", b, math.sqrt(3 / rank))):
            values = stream(seed, f"first-{kind}", name).uniform(-bound, bound, tuple(factor.shape))
            factor.copy_(torch.from_numpy(values))
            factor.requires_grad_(False)


def texts(tokens: Tokens, batch_size: int, seed: int, node: int) -> list[Batch]:
    """Draw the texts whose gradient a client measures: 64, or as many as it has."""
    count, size = min(len(tokens), _TEXTS), min(batch_size, _TEXTS)
    return list(minibatches(tokens, size, math.ceil(count / size), stream(seed, "gradient", node)))


def gradients(model: Model, layers: Iterable[str], batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """Sum dL/dW [m, n] of each layer over batches, each weighted by its texts.

    W itself is frozen, and quantised it could not be otherwise: the gradient is put together from what goes
    into the layer, x [..., n], and the gradient of what comes out, g [..., m], as sum g x'.

    Raises:
        ModelError: the loss does not depend on a layer.
    """
    found: dict[str, torch.Tensor] = {}
    modules: dict[str, Any] = {layer: model.module.get_submodule(layer) for layer in layers}

    def watch(layer: str) -> Any:
        def seen(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach()

            def add(g: torch.Tensor) -> None:
                outer = g.reshape(-1, g.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
                found[layer] = found[layer] + outer if layer in found else outer

            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]  # torch leaves it untyped

        return modules[layer].register_forward_hook(seen)

    handles = [watch(layer) for layer in modules]
    middles = [module.middle[ADAPTER] for module in modules.values()]
    try:
        for batch in batches:
            torch.autograd.grad(model.loss(batch) * len(batch.input_ids), middles, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if silent := sorted(modules.keys() - found.keys()):
        raise ModelError(f"the loss does not depend on {silent[0]}: leave it out of tuning.targets")
    return found


def best(gradient: torch.Tensor, rank: int, seed: int, layer: str) -> Factors:
    """Return factors of the leading ``rank`` components, scaled to a product of norm 1; zeros stay zeros.

    Randomised (Halko et al., SIAM Review 2011, algorithm 4.4), since a device cannot wait for the whole SVD
    of a large matrix; where ``rank`` is close to min(m, n) it is that.
    """
    g = gradient.double().cpu()
    if not g.any():
        return Factors(g.new_zeros(g.shape[0], rank), g.new_zeros(rank, g.shape[1]))
    g = g / g.norm()
    width = min(rank + _SPARE, *g.shape)
    q = g @ torch.from_numpy(stream(seed, "sketch", layer).normal(size=(g.shape[1], width)))
    for _ in range(_PASSES):
        q = torch.linalg.qr(g.T @ torch.linalg.qr(q).Q).Q
        q = g @ q
    q = torch.linalg.qr(q).Q
    u, s, vt = torch.linalg.svd(q.T @ g, full_matrices=False)
    return Factors(q @ u[:, :rank] * (s[:rank] / s[:rank].norm()), vt[:rank])


def measure(work: Work, batch_size: int, seed: int) -> Answer:
    """Client: send of each layer's gradient what fits into its factors."""
    layers = pairs(work.tensors)
    batches = texts(work.train, batch_size, seed, work.node)
    measured = gradients(work.model, layers, batches)
    answer: Tensors = {}
    for layer, (b, a) in layers.items():
        found = best(measured.pop(layer), work.tensors[a].shape[0], seed, layer)
        answer |= {b: found.b.float(), a: found.a.float()}
    return Answer(answer, len(work.train), {}, passes=Passes(len(batches), len(batches)))


def reject_longer(factors: Mapping[str, Factors]) -> None:
    """Server: no client's gradient counts for more than its length of 1.

    Raises:
        RejectedReply: one is longer.
    """
    for layer, item in factors.items():
        if (length := float(norm(item))) > 1.0 + 1e-3:
            raise RejectedReply(f"its gradient of {layer} has length {length:.4g}, and all have length 1")


def directions(mean: Factors, old: Factors) -> Factors:
    """Server: B and A from the mean of the clients' gradients; ``old`` where they add up to nothing."""
    if float(norm(mean)) == 0.0:
        return old
    m, rank = old.b.shape
    found = singular(mean, rank)
    return Factors((found.b * math.sqrt(m / rank)).float(), (found.a * A_ROW).float())


def folded(tensors: Tensors) -> Tensors:
    """Return the tensors with B R in the place of B, which is plain LoRA with R = 1."""
    return tensors | {
        b: (tensors[b].double() @ tensors[layer + MIDDLE].double()).float()
        for layer, (b, _) in pairs(tensors).items()
    }
