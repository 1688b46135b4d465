"""``fedllm bench sampling``: does choosing directions by the previous gradient pay, at equal forward passes?

LoRA of rank 1 in MiniLM's last layer and the head are trained for some rounds, else as in the preset
``fwdllm``. In each, backpropagation tells every client's gradient, and so all slopes that clients would
measure; directions drawn evenly are compared with directions chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedllm.presets import document
from fedllm.randomness import stream
from fedllm.tensors import Tensors
from strategies.base import Replay, Reply, State, Work
from strategies.forward.directions import Direction, flat
from strategies.forward.vectors import Flat, flatten, norm, shaped
from strategies.fwdllm.selection import alignments, choose
from strategies.registry import resolve_run
from strategies.session import Session

__all__ = ["compare", "run"]

Estimate = Callable[[Flat, Flat, list[Direction], int], Flat]
_OVERSAMPLED = 10
_LORA = (
    "tuning={peft='lora', rank=1, alpha=16.0, targets=['layer.5.output.dense']}",
    "training.batch_size=8",
    "fwdllm.directions=20",
    "fwdllm.learning_rate=0.07",
)


def run(rounds: int = 8, draws: int = 10) -> dict[str, Any]:
    """Compare on MiniLM: about a minute on an idle core; medians over the rounds."""
    session = Session(resolve_run(document("fwdllm"), _LORA))
    return compare(session, _warm(session), rounds, draws)


def compare(session: Session, tensors: Tensors, rounds: int, draws: int) -> dict[str, Any]:
    """Return, for each way of choosing P directions, how good the round's estimate is.

    Args:
        session: of a run with ``method = "fwdllm"``; its options give P, the rate and the decay.
        tensors: where to start.
        rounds: the first has no guide yet and is not counted.
        draws: estimates per round and way.

    Returns:
        ``guide_cosine``, of the previous round's estimate to the gradient, and for ``even``, ``chosen``
        (importance-corrected) and ``top`` (the paper's, biased): ``cosine`` to the gradient and ``error``,
        the mean ||G - g||^2 / ||g||^2; ``ideal`` chooses by the true gradient, which nobody has.
    """
    options = session.method.options  # type: ignore[attr-defined]
    ways: dict[str, Estimate] = {"even": _even, "chosen": _chosen, "top": _top, "ideal": _chosen}
    rows: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    cosines: list[float] = []
    guide: Flat | None = None
    for round in range(1, rounds + 1):
        gradients = [_gradient(session, tensors, node, round) for node in range(session.config.clients)]
        truth = np.mean(gradients, axis=0)
        if guide is not None:
            cosines.append(_cosine(guide, truth))
            for way, estimate in ways.items():
                by = truth if way == "ideal" else guide
                found = [
                    _cohort(gradients, by, estimate, options.directions, round, draw) for draw in range(draws)
                ]
                rows[way] += [(_cosine(g, truth), norm(g - truth) ** 2 / norm(truth) ** 2) for g in found]
        guide = _cohort(gradients, truth, _even, options.directions, round, draws)
        weights = flatten(tensors)
        step = options.learning_rate * norm(weights) / norm(guide)
        tensors = shaped(weights - step * guide, tensors)
    told: dict[str, Any] = {"guide_cosine": statistics.median(cosines)}
    for way, values in rows.items():
        cosine, error = (statistics.median(column) for column in zip(*values, strict=True))
        told[way] = {"cosine": cosine, "error": error}
    told["chosen_over_even_error"] = told["chosen"]["error"] / told["even"]["error"]
    return told


def _cohort(
    gradients: Sequence[Flat], guide: Flat, estimate: Estimate, count: int, round: int, draw: int
) -> Flat:
    """Average the clients' estimates; each client has candidates of its own in each draw."""
    found = [
        estimate(g, guide, [Direction(draw, round, node, i) for i in range(_OVERSAMPLED * count)], count)
        for node, g in enumerate(gradients)
    ]
    mean: Flat = np.mean(found, axis=0)
    return mean


def _even(gradient: Flat, guide: Flat, candidates: list[Direction], count: int) -> Flat:
    return _forward(gradient, candidates[:count], np.ones(count))


def _chosen(gradient: Flat, guide: Flat, candidates: list[Direction], count: int) -> Flat:
    choice = choose(guide, candidates, count)
    return _forward(gradient, [candidates[i] for i in choice.indices], choice.weights)


def _top(gradient: Flat, guide: Flat, candidates: list[Direction], count: int) -> Flat:
    order = np.argsort(-np.abs(alignments(guide, candidates)), kind="stable")
    return _forward(gradient, [candidates[i] for i in order[:count]], np.ones(count))


def _forward(gradient: Flat, directions: Sequence[Direction], weights: npt.NDArray[np.float64]) -> Flat:
    rows = np.stack([flat(v, len(gradient)) for v in directions]).astype(np.float64)
    mean: Flat = (weights * (rows @ gradient)) @ rows / len(directions)
    return mean


def _gradient(session: Session, tensors: Tensors, node: int, round: int) -> Flat:
    """Backpropagate on the batch that the client would probe."""
    train, _ = session.client_tokens(node)
    order = stream(session.config.seed, "batches", round, node).permutation(len(train))
    session.method.load(session.model, tensors)
    session.model.module.eval()
    loss = session.model.loss(train.batch(order[: session.config.training.batch_size]))
    parameters = session.model.trainable()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return flatten(dict(zip(parameters, grads, strict=True)))


def _cosine(a: Flat, b: Flat) -> float:
    return float(a @ b) / (norm(a) * norm(b))


def _warm(session: Session) -> Tensors:
    """Set the head in closed form from one client's texts."""
    method, tensors, (train, test) = session.method, session.initial, session.client_tokens(0)
    work = Work("setup", {}, 0, 0, 0, 0.0, session.model, tensors, {}, train, test)
    answer = method.run(work)
    state = State(0, tensors)
    acc = method.fold(method.begin(state, 0), "setup", Reply(0, answer.tensors, answer.examples, {}))
    proposal = method.step(state, acc).proposal
    return method.replay(tensors, proposal.record) if isinstance(proposal, Replay) else proposal
