"""``fedllm bench attacks``: what three bad clients of ten do to a model, under each way of averaging.

Clients, texts and method are those of ``quickstart``: LoRA of rank 8 on MiniLM, ten clients with skewed
classes of BBC news; of them the seed draws three. To be short, texts have 16 tokens and batches 8 of them.
No gate stands before the averages and no codec, so that what is compared is the averages alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedllm.config import AttackConfig, RunConfig, ServerConfig
from fedllm.models.evaluation import evaluate
from fedllm.presets import document
from fedllm.randomness import derive
from fedllm.tensors import Tensors
from strategies.attack import attackers, backdoor_success, bent, poisoned
from strategies.base import Reply, State, Work
from strategies.registry import open_method, resolve_run
from strategies.session import Session

__all__ = ["ATTACKS", "DEFENCES", "compare", "run"]

_SHARE = 0.3
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "sign_flip": {"kind": "sign_flip", "factor": 4.0, "share": _SHARE},
    "scale": {"kind": "scale", "factor": 8.0, "share": _SHARE},
    "label_flip": {"kind": "label_flip", "factor": 2.0, "share": _SHARE},
    "backdoor": {"kind": "backdoor", "factor": 3.0, "share": _SHARE},
    "garbage": {"kind": "garbage", "factor": 4.0, "share": _SHARE},
}
"""Settings of ``[attack]``, by what the table calls them; ``none`` is honest."""
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "norm_bound": {"robust": "norm_bound"},
    "trimmed_mean": {"robust": "trimmed_mean", "byzantine": _SHARE},
    "median": {"robust": "median"},
    "multi_krum": {"robust": "multi_krum", "byzantine": _SHARE},
}
"""Settings of ``[server]``, likewise."""
_SHORT = ("data.max_length=16", "training.batch_size=8", "rounds=4")


def run(attacks: Sequence[str] = (*ATTACKS,), defences: Sequence[str] = (*DEFENCES,)) -> dict[str, Any]:
    """Try every attack against every defence on MiniLM: some minutes on an idle core."""
    session = Session(resolve_run(document("quickstart"), _SHORT))
    return compare(session, attacks, defences)


def compare(session: Session, attacks: Sequence[str], defences: Sequence[str]) -> dict[str, Any]:
    """Train anew for each pair, and score what came of it.

    Args:
        session: of a run whose method averages updates.
        attacks: names of :data:`ATTACKS`.
        defences: names of :data:`DEFENCES`.

    Returns:
        By attack and defence ``accuracy`` on the server's test set, and ``backdoor_success`` of a backdoor.
    """
    return {
        attack: {defence: _cell(session, ATTACKS[attack], DEFENCES[defence]) for defence in defences}
        for attack in attacks
    }


def _cell(session: Session, attack: Mapping[str, Any], defence: Mapping[str, Any]) -> dict[str, float]:
    settings = {"attack": AttackConfig(**attack), "server": ServerConfig(**defence)}
    config = RunConfig.model_validate({**dict(session.config), **settings})
    method, state = open_method(config), State(0, session.initial)
    for number in range(1, config.rounds + 1):
        acc = method.begin(state, number)
        for node in range(config.clients):
            acc = method.fold(acc, "fit", _reply(session, config, state, number, node))
        proposal = method.step(state, acc).proposal
        assert isinstance(proposal, dict)
        state = State(number, proposal)
    method.load(session.model, state.tensors)
    test, size = session.test_tokens, config.evaluation.batch_size
    found = {"accuracy": evaluate(session.model, test, size)["accuracy"]}
    if config.attack.kind == "backdoor":
        found["backdoor_success"] = backdoor_success(config, session.model, test)
    return found


def _reply(session: Session, config: RunConfig, state: State, number: int, node: int) -> Reply:
    """Train one client, honest or not, from the global tensors."""
    train, test = session.client_tokens(node)
    attacks, model, method = node in attackers(config), session.model, session.method
    if attacks:
        train = poisoned(config, model, train)
    method.load(model, state.tensors)
    progress = (number - 1) / config.rounds
    work = Work("fit", {}, number, 0, node, progress, model, state.tensors, {}, train, test)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.seed, "torch", number, 0, node) % 2**63)
        answer = method.run(work)
    update: Tensors = bent(config, answer.tensors, number, 0, node) if attacks else answer.tensors
    return Reply(node, update, answer.examples, {})
