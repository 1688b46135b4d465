"""``fedllm bench aggregation``: LoRA's rules against dense sums, the factored SVD's speed, server memory.

Every figure comes from the code that a round runs; the references are dense float64 sums and LAPACK's SVD.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import numpy as np
import torch

from fedllm.config import RunConfig
from fedllm.tensors import Tensors, dense_bytes, spec_of
from strategies.base import Exchange, Reply, State
from strategies.lora.factors import Factors, pairs, stack, truncate
from strategies.lora.method import Lora

__all__ = ["exactness", "memory", "run", "svd_speed"]

SHAPES = {"linear_in": (768, 192), "linear_out": (192, 768), "square": (384, 384)}
RULES = ("fedit", "ffa", "alternate", "stack", "residual", "svd")


def run() -> dict[str, object]:
    """Run all three; about a minute on one core, most of it the dense SVD that we are set against."""
    return {"exactness": exactness(), "svd": svd_speed(), "memory": memory()}


def exactness(clients: int = 6, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Relative error to the dense weighted sum, the largest of all layers and rounds, by rule.

    ``svd`` is compared to the best approximation of its rank: by how much its error exceeds that one's.
    ``fedit`` stands beside them for what averaging A and B apart costs.
    """
    return {rule: {"relative_error": _worst(rule, clients, rounds)} for rule in RULES}


def svd_speed(size: int = 2048, clients: int = 10, rank: int = 16, keep: int = 16) -> dict[str, float]:
    """Time the factored SVD of stacked factors beside LAPACK's SVD of the dense float32 sum."""
    parts = [Factors(_normal((size, rank), k, 0), _normal((rank, size), k, 1)) for k in range(clients)]
    weights = [1.0 / clients] * clients
    truncate(stack(parts, weights), keep)  # LAPACK warms up
    factored = min(_seconds(lambda: truncate(stack(parts, weights), keep)) for _ in range(5))
    dense = stack(parts, weights).product()
    single = dense.float()
    reference = _seconds(lambda: torch.linalg.svd(single, full_matrices=False))
    singular = torch.linalg.svdvals(dense)
    error = float((truncate(stack(parts, weights), keep).product() - dense).norm())
    return {
        "size": size,
        "stacked_ranks": clients * rank,
        "factored_seconds": factored,
        "dense_seconds": reference,
        "speedup": reference / factored,
        "error_over_optimum": error / float(singular[keep:].norm()) - 1.0,
    }


def memory(size: int = 512, layers: int = 4, rank: int = 16) -> dict[str, dict[str, float]]:
    """Bytes that the accumulator holds after 10 and after 1,000 replies, and their difference in payloads.

    Rules on products hold factors until the stacked ranks reach the matrix's size, then one dense int64
    matrix per layer, however many replies follow; ``bound_payloads`` is that matrix in payloads.
    """
    return {rule: _held(rule, size, layers, rank) for rule in ("fedit", "svd")}


def _worst(rule: str, clients: int, rounds: int, rank: int = 8) -> float:
    method = _method(rule)
    state = State(0, _start(method, SHAPES, rank))
    worst = 0.0
    for round in range(1, rounds + 1):
        state, dense = _round(method, state, {node: 1 + 7 * node for node in range(clients)}, round)
        for layer, found in _products(state.tensors, rank).items():
            error = float((found - dense[layer]).norm())
            if rule == "svd":
                error -= float(torch.linalg.svdvals(dense[layer])[rank:].norm())
            worst = max(worst, error / float(dense[layer].norm()))
    return worst


def _method(rule: str) -> Lora:
    return Lora(RunConfig.model_validate({"method": "lora", "options": {"rule": rule}}))


def _round(
    method: Lora, state: State, cohort: dict[int, int], round: int
) -> tuple[State, dict[str, torch.Tensor]]:
    """Fold random changes; return the next state and the dense weighted sum of what the clients hold."""
    acc = method.begin(state, round)
    exchange = method.plan(state, acc)
    assert isinstance(exchange, Exchange)
    spec = method.spec(exchange, state.tensors)
    dense: dict[str, torch.Tensor] = {}
    for node, examples in cohort.items():
        change = {
            name: _normal(s.shape, round, node, i) * 0.1 for i, (name, s) in enumerate(sorted(spec.items()))
        }
        acc = method.fold(acc, exchange.kind, Reply(node, change, examples, {}))
        held = state.tensors | {name: state.tensors[name] + value for name, value in change.items()}
        for layer, product in _products(held, 8).items():
            dense[layer] = dense.get(layer, 0.0) + product * (examples / sum(cohort.values()))
    step = method.step(state, acc)
    after, kept = step.proposal, step.memory
    assert isinstance(after, dict)
    return State(state.version + 1, after, kept), dense


def _start(method: Lora, shapes: dict[str, tuple[int, int]], rank: int) -> Tensors:
    tensors: Tensors = {}
    for i, (layer, (m, n)) in enumerate(shapes.items()):
        tensors[f"{layer}.lora_B.default.weight"] = _normal((m, rank), 0, i)
        if method.rule != "ffa":
            tensors[f"{layer}.lora_A.default.weight"] = _frozen(layer, rank, n)
        if method.rule in ("stack", "residual"):
            least = min(m, n)
            tensors[f"{layer}.base_B"] = torch.eye(m) if m == least else torch.zeros(m, n)
            tensors[f"{layer}.base_A"] = torch.zeros(m, n) if m == least else torch.eye(n)
    return tensors


def _products(tensors: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """What each layer's adapter and base add to its weight, dense float64, in units of the common scale."""
    found = {}
    for layer in sorted({name.partition(".")[0] for name in tensors}):
        b = tensors[f"{layer}.lora_B.default.weight"]
        a = tensors.get(f"{layer}.lora_A.default.weight")
        a = _frozen(layer, rank, SHAPES[layer][1]) if a is None else a
        found[layer] = b.double() @ a.double()
        if f"{layer}.base_B" in tensors:
            found[layer] += tensors[f"{layer}.base_B"].double() @ tensors[f"{layer}.base_A"].double()
    return found


def _held(rule: str, size: int, layers: int, rank: int) -> dict[str, float]:
    method = _method(rule)
    shapes = {f"layer{i}": (size, size) for i in range(layers)}
    state = State(0, _start(method, shapes, rank))
    payload = dense_bytes(spec_of(state.tensors))
    assert pairs(state.tensors).keys() == shapes.keys()
    acc, seen = method.begin(state, 1), {}
    empty = len(pickle.dumps(acc))
    for node in range(1000):
        change = {name: torch.full_like(t, 1e-3 * (node + 1)) for name, t in state.tensors.items()}
        acc = method.fold(acc, "fit", Reply(node, change, 1 + node % 5, {}))
        if node + 1 in (10, 1000):
            seen[node + 1] = len(pickle.dumps(acc)) - empty
    # An averaging rule has its sums from the start: 8 bytes per value, two payloads.
    return {
        "payload_bytes": payload,
        "after_10_bytes": seen[10],
        "after_1000_bytes": seen[1000],
        "growth_payloads": (seen[1000] - seen[10]) / payload,
        "bound_payloads": 0.0 if rule == "fedit" else 8 * layers * size * size / payload,
    }


def _normal(shape: tuple[int, ...], *path: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(path).standard_normal(shape, dtype=np.float32))


def _frozen(layer: str, rank: int, n: int) -> torch.Tensor:
    return _normal((rank, n), *layer.encode())


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
