"""SCAFFOLD beside what its paper says, written out with torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.models.training import minibatches
from fedllm.randomness import stream
from fedllm.tensors import Tensors
from strategies.base import Exchange, State
from strategies.scaffold.method import Scaffold
from strategies.session import Session
from tests.conformance.federation import ask, commit, reply_of, session_for, start

RATE, STEPS = 0.1, 3
SGD = {"optimizer": "sgd", "local_steps": STEPS, "batch_size": 8, "learning_rate": RATE}
CONTROL = "control/"


@pytest.fixture(scope="module")
def session(tiny_encoder: Path, tiny_texts: Path) -> Session:
    return session_for(tiny_encoder, tiny_texts, "scaffold", training=SGD)


def weights(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith(CONTROL)}


def train(session: Session, rounds: int, nodes: tuple[int, ...]) -> tuple[State, dict[int, Tensors]]:
    """Return the server's state, and what each client keeps."""
    state, kept = start(session), dict.fromkeys(range(4), Tensors())
    for round in range(1, rounds + 1):
        replies = []
        for node in nodes:
            answer = ask(session, state, Exchange("fit"), node, round, local=kept[node])
            kept[node] = answer.local
            replies.append(reply_of(answer, node))
        state = commit(session, state, round, "fit", replies)
    return state, kept


def by_hand(session: Session, rounds: int, nodes: tuple[int, ...]) -> tuple[Tensors, Tensors]:
    """Algorithm 1 with option II: w and c after some rounds."""
    model = session.model
    w = weights(session.initial)
    c = {name: torch.zeros_like(value) for name, value in w.items()}
    own = {node: dict(c) for node in nodes}
    texts = {node: session.client_tokens(node)[0] for node in nodes}
    total = sum(map(len, texts.values()))
    for round in range(1, rounds + 1):
        moved = {name: torch.zeros_like(value) for name, value in w.items()}
        drifted = {name: torch.zeros_like(value) for name, value in w.items()}
        for node in nodes:
            model.write(w)
            generator = stream(session.config.seed, "batches", round, node)
            for batch in minibatches(texts[node], 8, STEPS, generator):
                parameters = model.trainable()
                slopes = torch.autograd.grad(model.loss(batch), list(parameters.values()))
                with torch.no_grad():
                    for (name, p), slope in zip(parameters.items(), slopes, strict=True):
                        p -= RATE * (slope - own[node][name] + c[name])
            for name, after in model.read().items():
                new = own[node][name] - c[name] + (w[name] - after) / (STEPS * RATE)
                share = len(texts[node]) / total
                moved[name] += share * (after - w[name])
                drifted[name] += share * (new - own[node][name])
                own[node][name] = new
        w = {name: value + moved[name] for name, value in w.items()}
        c = {name: value + len(nodes) / 4 * drifted[name] for name, value in c.items()}
    return w, c


@pytest.mark.parametrize("nodes", [pytest.param((0, 1, 2, 3), marks=pytest.mark.slow), (0, 2)])
def test_three_rounds_are_those_of_the_paper(session: Session, nodes: tuple[int, ...]) -> None:
    state, _ = train(session, 3, nodes)
    w, c = by_hand(session, 3, nodes)
    for name, value in w.items():
        torch.testing.assert_close(state.tensors[name], value, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state.tensors[CONTROL + name], c[name], atol=1e-5, rtol=1e-4)
    assert any(value.abs().max() > 1e-3 for value in c.values())


def test_where_all_take_part_the_servers_control_is_the_mean_of_the_clients(session: Session) -> None:
    state, kept = train(session, 2, (0, 1, 2, 3))
    sizes = [len(session.client_tokens(node)[0]) for node in range(4)]
    for name in weights(session.initial):
        mean = sum(size * kept[node][name] for node, size in enumerate(sizes)) / sum(sizes)
        torch.testing.assert_close(state.tensors[CONTROL + name], mean, atol=1e-6, rtol=1e-4)


def test_a_client_alone_has_nothing_to_correct(tiny_encoder: Path, tiny_texts: Path) -> None:
    alone = {"clients": 1, "training": SGD, "data": {"path": str(tiny_texts), "max_length": 16}}
    state, _ = train(session_for(tiny_encoder, tiny_texts, "scaffold", **alone), 2, (0,))
    plain, _ = train(session_for(tiny_encoder, tiny_texts, "lora", **alone), 2, (0,))
    for name, value in plain.tensors.items():
        torch.testing.assert_close(state.tensors[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"training": {"optimizer": "adamw"}}, 'training.optimizer = "sgd"'),
        ({"training": SGD | {"max_grad_norm": 1.0}}, "max_grad_norm, proximal and weight_decay to 0"),
        ({"training": SGD, "server": {"optimizer": "adam"}}, 'server.optimizer at "sgd"'),
    ],
)
def test_what_bends_its_steps_is_refused(sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Scaffold(RunConfig.model_validate({"method": "scaffold", **sections}))
