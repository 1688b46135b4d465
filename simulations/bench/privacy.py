"""``fedllm bench privacy``: what a budget of differential privacy costs, and what an attacker still sees.

Clients, texts and method are those of ``quickstart``: LoRA of rank 8 on MiniLM, and a head; ten clients that
all take part, or a hundred of whom twenty do on average. To be short, texts have 16 tokens and batches 8 of
them. Without a budget updates are clipped all the same, so that what is compared is the noise alone.

The attack is on membership by a threshold on the loss (Yeom et al., CSF 2018): who holds the result guesses
that texts of low loss were trained on. Its advantage is the most by which true exceed false positives, over
all thresholds: 0 is a coin, 1 is certainty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fedllm.config import RunConfig
from fedllm.data.tokens import Tokens
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model
from fedllm.presets import document
from fedllm.privacy.noise import uniform
from fedllm.protocol.uplink import clipped
from fedllm.randomness import derive
from fedllm.tensors import Tensors, norm_of, spec_of
from strategies.base import Work
from strategies.private import PrivateSum, delta_of, reach, with_noise
from strategies.registry import resolve_run
from strategies.session import Session

__all__ = ["advantage", "compare", "run"]

_SHORT = ("data.max_length=16", "training.batch_size=8", "rounds=4", "privacy.clip=1.0")
_COHORT = 20


def run(clients: Sequence[int] = (10, 100), budgets: Sequence[float] = (math.inf, 8, 3, 1)) -> dict[str, Any]:
    """Train under each budget, with so many clients: some minutes on an idle core."""
    return {
        f"{count} clients": compare(
            Session(
                resolve_run(
                    document("quickstart"),
                    [*_SHORT, f"clients={count}", f"server.sample={min(count, _COHORT)}"],
                )
            ),
            budgets,
        )
        for count in clients
    }


def compare(session: Session, budgets: Sequence[float]) -> dict[str, dict[str, float]]:
    """Train anew under each budget; return noise, accuracy and the attack's advantage by epsilon.

    Args:
        session: of a run with ``privacy.clip`` whose method is private.
        budgets: values of epsilon; infinity adds no noise.
    """
    return {f"epsilon {budget:g}": _cell(session, budget) for budget in budgets}


def _cell(session: Session, budget: float) -> dict[str, float]:
    config, clip = session.config, session.config.privacy.clip
    assert clip is not None
    noise = 0.0
    if math.isfinite(budget):
        privacy = config.privacy.model_copy(update={"target_epsilon": budget})
        config = with_noise(config.model_copy(update={"privacy": privacy}))
        noise = config.privacy.noise_multiplier or 0.0
    spec, tensors = spec_of(session.initial), dict(session.initial)
    for number in range(1, config.rounds + 1):
        total = PrivateSum(spec, config.cohort)
        # A benchmark's coins and noise hide nothing: they come of the seed, to be the same again.
        coins = uniform(_key(config, number, "cohort"), config.clients)
        for node in np.flatnonzero(coins < config.cohort / config.clients).tolist():
            update = _update(session, tensors, number, node)
            total.add(clipped(update, norm_of(update), clip), 1)
        total.blur(_key(config, number, "noise"), noise * reach(clip, spec))
        change = total.mean()
        tensors = {name: value + change[name] for name, value in tensors.items()}
    session.method.load(session.model, tensors)
    members, others = session.train_tokens, session.test_tokens
    few = members.of_texts(np.arange(0, len(members), max(1, len(members) // len(others))))
    return {
        "noise_multiplier": noise,
        "delta": delta_of(config),
        "accuracy": evaluate(session.model, others, config.evaluation.batch_size)["accuracy"],
        "membership_advantage": advantage(losses(session.model, few), losses(session.model, others)),
    }


def _update(session: Session, tensors: Tensors, number: int, node: int) -> Tensors:
    train, test = session.client_tokens(node)
    session.method.load(session.model, tensors)
    progress = (number - 1) / session.config.rounds
    work = Work("fit", {}, number, 0, node, progress, session.model, tensors, {}, train, test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(session.config.seed, "torch", number, 0, node) % 2**63)
        return session.method.run(work).tensors


def _key(config: RunConfig, number: int, purpose: str) -> bytes:
    return derive(config.seed, "bench", purpose, number).to_bytes(32, "little")


def losses(model: Model, tokens: Tokens) -> np.ndarray:
    """Return the loss of each text by itself, of a model that sorts texts into classes."""
    found, training = np.empty(len(tokens)), model.module.training
    model.module.eval()
    with torch.inference_mode():
        for indices in model.batches(tokens, model.config.evaluation.batch_size):
            batch = tokens.batch(indices)
            logits = model.forward(batch).logits
            found[indices] = functional.cross_entropy(logits, batch.labels, reduction="none").numpy()
    model.module.train(training)
    return found


def advantage(members: np.ndarray, others: np.ndarray) -> float:
    """Return the most by which true exceed false positives, where a loss up to a threshold says member.

    >>> advantage(np.array([0.1, 0.2]), np.array([0.3, 0.4])), advantage(np.ones(3), np.ones(3))
    (1.0, 0.0)
    """
    at = np.concatenate([members, others])
    positives = [np.searchsorted(np.sort(one), at, side="right") / len(one) for one in (members, others)]
    return max(0.0, float(np.max(positives[0] - positives[1])))
