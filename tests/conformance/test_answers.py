"""What a client tells beside its tensors, and which named random numbers it draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm import randomness
from strategies.base import Answer, Exchange, State
from strategies.session import Session
from tests.conformance.federation import ask, session_for, start
from tests.parts import quick

STEPS = 3
FORWARD = {"tuning": {"rank": 1, "targets": ("query",)}}
TRAINING: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg"},
    "lora": {"method": "lora"},
    "lora-alternate": {"method": "lora", "options": {"rule": "alternate"}},
    "fedkd-alone": {"method": "fedkd", "options": {"teacher": False}},
}
DRAWN: dict[str, tuple[dict[str, Any], set[tuple[object, ...]]]] = {
    **{name: (sections, {("batches", 5, 2)}) for name, sections in TRAINING.items()},
    "fedkd": ({"method": "fedkd"}, {("batches", 5, 2)}),
    "mezo": ({"method": "mezo", **FORWARD}, {("batches", 5, 2), ("candidates", 5, 2)}),
    "fedkseed": (
        {"method": "mezo", "options": {"candidates": 16}, **FORWARD},
        {("batches", 5, 2), ("candidates", 5, 2)},
    ),
    "fwdllm": ({"method": "fwdllm", "options": {"directions": 6}, **FORWARD}, {("batches", 5, 2)}),
}
"""A client's draws by name, round and number; those of directions have a test of their own."""


@pytest.fixture(scope="module")
def opened(tiny_encoder: Path, tiny_texts: Path) -> Callable[[str], Session]:
    @cache
    def open_once(name: str) -> Session:
        session = session_for(
            tiny_encoder, tiny_texts, **(TRAINING | {n: s for n, (s, _) in DRAWN.items()})[name]
        )
        start(session)
        return session

    return open_once


def answered(session: Session, state: State, round: int = 5, node: int = 2) -> Answer:
    exchange = session.method.plan(state, session.method.begin(state, round))
    assert isinstance(exchange, Exchange)
    return ask(session, state, exchange, node, round)


@pytest.mark.parametrize("name", TRAINING)
def test_training_tells_its_mean_loss_and_its_passes(name: str, opened: Callable[[str], Session]) -> None:
    session = opened(name)
    state = start(session)
    seen: list[float] = []
    model, forward = session.model, session.model.forward

    def watch(batch: Any, **settings: Any) -> Any:
        assert not any(settings.values())  # nobody compares hidden states or attention here: they cost memory
        output = forward(batch, **settings)
        assert output.loss is not None
        seen.append(float(output.loss.detach()))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", watch)
        answer = answered(session, state)
    assert len(seen) == STEPS
    assert answer.metrics == {"loss": pytest.approx(sum(seen) / STEPS, rel=1e-5)}
    assert answer.examples == len(session.client_tokens(2)[0])
    assert (answer.passes.forward, answer.passes.backward) == (STEPS, STEPS)


@pytest.mark.parametrize("name", quick(DRAWN, "lora", "fedkd", "fedkseed", "fwdllm"))
def test_every_draw_is_named_by_what_it_is_for(
    name: str, opened: Callable[[str], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names, round and number decide all numbers of a run: another name is another run."""
    session = opened(name)
    state = start(session)
    drawn: set[tuple[object, ...]] = set()
    derive = randomness.derive

    def watch(seed: int, *path: str | int) -> int:
        drawn.add(path)
        assert seed == session.config.seed
        return derive(seed, *path)

    monkeypatch.setattr(randomness, "derive", watch)
    answered(session, state)
    assert {path for path in drawn if path[0] not in ("direction", "split", "client split")} == DRAWN[name][1]


def test_the_servers_draws_are_named_too(
    opened: Callable[[str], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.rounds.roster import sample
    from strategies.lora.layers import fresh

    drawn: list[tuple[object, ...]] = []
    derive = randomness.derive
    monkeypatch.setattr(
        randomness, "derive", lambda seed, *path: drawn.append((seed, *path)) or derive(seed, *path)
    )
    assert len(set(sample(list(range(9)), 4, 11, 3))) == 4
    assert fresh(torch.zeros(2, 3), 11, "layer", 4).shape == (2, 3)
    assert drawn == [(11, "sample", 3), (11, "fresh-A", "layer", 4)]
