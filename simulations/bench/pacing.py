"""``fedllm bench pacing``: does asking for more directions while a round is noisy save any?

The preset ``fwdllm`` in a plain loop: its split, batches, directions, gate and step, on features computed
once. Slopes are the gradient's projections, and a linear head's gradient is known in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedllm.config import RunConfig
from fedllm.presets import document
from fedllm.randomness import stream
from fedllm.tensors import Tensors
from strategies.forward.directions import Direction, flat
from strategies.forward.vectors import entries, flatten, norm, shaped
from strategies.fwdllm.method import Options, decay
from strategies.fwdllm.pacing import Gate, stretch
from strategies.fwdllm.warm_start import head, statistics, statistics_spec
from strategies.registry import resolve_run
from strategies.session import Session

__all__ = ["Task", "interpolated", "run", "train"]

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_FIXED = (6, 10, 20, 40, 80)
_EXCHANGE, _CAP = 4, 20
_THRESHOLDS = {"ratio": (0.025, 0.05, 0.1), "variance": (0.02, 0.01, 0.005)}


@dataclass(frozen=True)
class Task:
    """What is learned from: each client's features [n, width] and labels [n], and the test set's."""

    clients: list[tuple[Features, Labels]]
    test: tuple[Features, Labels]
    classes: int

    @property
    def shares(self) -> list[float]:
        """Each client's weight in the mean."""
        total = sum(len(labels) for _, labels in self.clients)
        return [len(labels) / total for _, labels in self.clients]


def run(seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Sweep fixed counts and thresholds on BBC News; some minutes on one core.

    Returns:
        By setting: ``accuracy`` after the last round and ``directions`` of a whole run, means over the
        seeds; for paced ones also ``of_fixed``: their directions as a share of those that a fixed count
        would need for the same accuracy, interpolated in the logarithm. Above 1 pacing loses; None is
        beyond the sweep.
    """
    tasks = {seed: task for seed, task in zip(seeds, _tasks(seeds), strict=True)}

    def measure(*overrides: str) -> dict[str, Any]:
        found = [
            train(resolve_run(document("fwdllm"), [f"seed={seed}", *overrides]), task)
            for seed, task in tasks.items()
        ]
        return {"accuracy": fmean(f[0] for f in found), "directions": fmean(f[1] for f in found)}

    fixed = {f"fixed {count}": measure(f"fwdllm.directions={count}") for count in _FIXED}
    curve = [(row["accuracy"], row["directions"]) for row in fixed.values()]
    paced = {}
    for rule, thresholds in _THRESHOLDS.items():
        for threshold in thresholds:
            row = measure(
                f"fwdllm.pacing={rule}",
                f"fwdllm.threshold={threshold}",
                f"fwdllm.directions={_EXCHANGE}",
                f"fwdllm.max_exchanges={_CAP}",
                *(["fwdllm.pacing_tensor=head.weight"] if rule == "variance" else []),
            )
            needed = interpolated(curve, row["accuracy"])
            row["of_fixed"] = None if needed is None else row["directions"] / needed
            paced[f"{rule} {threshold:g}"] = row
    return {**fixed, **paced}


def interpolated(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Return the directions at which the curve first reaches an accuracy; None where it never does.

    Args:
        curve: (accuracy, directions), directions ascending.
        accuracy: to be reached; below the curve's start nothing is known.

    >>> round(interpolated([(0.8, 100), (0.9, 10_000)], 0.85))
    1000
    >>> interpolated([(0.8, 100), (0.9, 10_000)], 0.95)
    """
    for (low, fewer), (high, more) in pairwise(curve):
        if low <= accuracy <= high:
            share = (accuracy - low) / (high - low) if high > low else 0.0
            return float(fewer * (more / fewer) ** share)
    return None


def train(config: RunConfig, task: Task) -> tuple[float, int]:
    """Train a head from class means by a run's options; return (accuracy, directions probed)."""
    options = Options.model_validate(config.options)
    gate = Gate(options.pacing, options.threshold, options.max_exchanges)
    tensors, used = _start(task), 0
    part = stretch(tensors, options.pacing_tensor)
    for round in range(1, config.rounds + 1):
        gradients = [_gradient(config, task, tensors, node, round) for node in range(len(task.clients))]
        a, b = np.zeros(entries(tensors)), np.zeros(entries(tensors))
        exchanges = 0
        while True:
            numbers = range(exchanges * options.directions, (exchanges + 1) * options.directions)
            for node, (share, gradient) in enumerate(zip(task.shares, gradients, strict=True)):
                rows = np.stack(
                    [flat(Direction(config.seed, round, node, i), len(gradient)) for i in numbers]
                )
                slopes = rows @ gradient
                a += share * (slopes[0::2] @ rows[0::2])
                b += share * (slopes[1::2] @ rows[1::2])
            exchanges += 1
            half = exchanges * options.directions / 2
            if gate.exhausted(exchanges) or gate.passes(gate.measure(a / half, b / half, part)):
                break
        used += exchanges * options.directions * len(task.clients)
        weights, step = flatten(tensors), a + b
        rate = options.learning_rate * decay(options.schedule, (round - 1) / config.rounds)
        tensors = shaped(weights - rate * norm(weights) / norm(step) * step, tensors)
    features, labels = task.test
    weight, bias = (tensors[name].numpy() for name in ("head.weight", "head.bias"))
    return float(((features @ weight.T + bias).argmax(1) == labels).mean()), used


def _start(task: Task) -> Tensors:
    """Set the head to the class means, as the preset's setup does."""
    spec = statistics_spec("means", task.classes, task.clients[0][0].shape[1])
    total = {name: torch.zeros(part.shape) for name, part in spec.items()}
    for features, labels in task.clients:
        found = statistics(torch.from_numpy(features).__getitem__, labels, spec)
        total = {name: total[name] + found[name] for name in total}
    weight, bias = head("means", total)
    return {"head.weight": weight, "head.bias": bias}


def _gradient(config: RunConfig, task: Task, tensors: Tensors, node: int, round: int) -> Features:
    """Return the cross entropy's gradient on a client's batch in closed form: bias first, as names sort."""
    features, labels = task.clients[node]
    order = stream(config.seed, "batches", round, node).permutation(len(labels))
    some = order[: config.training.batch_size]
    x = torch.from_numpy(features[some])
    errors = torch.softmax(x @ tensors["head.weight"].T + tensors["head.bias"], dim=1)
    errors[torch.arange(len(some)), torch.from_numpy(labels[some])] -= 1.0
    errors /= len(some)
    found: Features = torch.cat([errors.sum(0), (errors.T @ x).reshape(-1)]).numpy()
    return found


def _tasks(seeds: Sequence[int]) -> list[Task]:
    """Compute every text's features once; a seed says how the texts are split and shared out."""
    sessions = [Session(resolve_run(document("fwdllm"), [f"seed={seed}"])) for seed in seeds]
    corpus, model = sessions[0].corpus, sessions[0].model
    tokens = sessions[0].tokenise(corpus)
    model.module.eval()
    with torch.inference_mode():
        parts = []
        for first in range(0, len(tokens), 64):
            batch = tokens.batch(np.arange(first, min(first + 64, len(tokens))))
            parts.append(
                model.module.features(
                    batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
                ).cpu()
            )
    features = torch.cat(parts).numpy()
    place = {text: number for number, text in enumerate(corpus.texts)}

    def of(texts: Sequence[str], labels: Labels | None) -> tuple[Features, Labels]:
        assert labels is not None  # the preset classifies
        return features[[place[text] for text in texts]], labels

    tasks = []
    for session in sessions:
        train_texts, test = session.split
        clients = [train_texts.subset(part) for part in session.partition]
        tasks.append(
            Task(
                [of(c.texts, c.labels) for c in clients],
                of(test.texts, test.labels),
                len(corpus.label_names),
            )
        )
    return tasks
