"""Rows that every federated method must pass, on a tiny model. A new method adds itself to METHODS."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fedllm.tensors import fingerprint, spec_of
from strategies.base import Commit, Exchange, State
from strategies.session import Session
from tests.conformance.federation import ask, commit, federate, logits, reply_of, session_for, start

SGD = {"optimizer": "sgd", "local_steps": 3, "batch_size": 8, "learning_rate": 1e-2}
SMALL = ("bitfit", "bottleneck")
LORA_RULES = ("fedit", "ffa", "alternate", "svd", "stack", "residual", "hetero")
SETUP = {"lora-fed-sb": {"method": "lora", "options": {"rule": "fed-sb"}}}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg"},
    "fedavg-blocks": {"method": "fedavg", "tuning": {"blocks": 2}},
    "lora-blocks": {"method": "lora", "tuning": {"blocks": 2, "block_order": "down"}},
    **{f"lora-{rule}": {"method": "lora", "options": {"rule": rule}} for rule in LORA_RULES},
    **{
        f"lora-{rule}-mixed": {"method": "lora", "options": {"rule": rule, "ranks": (1, 2, 4, 3)}}
        for rule in ("svd", "stack", "hetero")
    },
    **{f"lora-{peft}": {"method": "lora", "tuning": {"peft": peft, "rank": 4}} for peft in SMALL},
}
AT_ONCE = tuple(METHODS)
"""Methods that begin with the first round."""
METHODS |= SETUP
AVERAGING = tuple(METHODS)
"""Methods whose round is a weighted mean of what clients trained."""
FORWARD = {"tuning": {"rank": 1, "targets": ("query",)}}
SLOPES: dict[str, dict[str, Any]] = {
    "fwdllm": {},
    "fwdllm-antithetic": {"estimator": "antithetic"},
    "fwdllm-dense": {"upload": "dense"},
    "fwdllm-chosen": {"candidates": 4},
    "fwdllm-warm": {"warm_start": "means", "pacing": "ratio", "max_exchanges": 2},
}
METHODS["lora-fedsa"] = {
    "method": "lora",
    "options": {"rule": "fedsa"},
    "evaluation": {"every": 0, "clients": True},
    "data": {"client_test_fraction": 0.2},
}
METHODS |= {
    **{
        name: {"method": "fwdllm", "options": {"directions": 3, **options}, **FORWARD}
        for name, options in SLOPES.items()
    },
    **{
        f"fwdllm-{peft}": {
            "method": "fwdllm",
            "options": {"directions": 3},
            "tuning": {"peft": peft, "rank": 1},
        }
        for peft in SMALL
    },
    "mixed": {"method": "mixed", "options": {"nodes": [0, 1], "directions": 3}},
    "mezo": {"method": "mezo", **FORWARD},
    "fedkseed": {"method": "mezo", "options": {"candidates": 16}, **FORWARD},
    "fedkd": {"method": "fedkd"},
    "scaffold": {"method": "scaffold", "training": SGD},
    "fednova": {"method": "fednova", "training": SGD, "options": {"epochs": 0.4}},
}


SLOW = {
    "lora-blocks",
    "lora-fedit",
    "lora-ffa",
    "lora-alternate",
    "lora-svd",
    "lora-stack",
    "lora-stack-mixed",
    "lora-hetero",
    "lora-bitfit",
    "lora-bottleneck",
    "fwdllm",
    "fwdllm-antithetic",
    "fwdllm-dense",
    "fwdllm-chosen",
    "fwdllm-bitfit",
    "fwdllm-bottleneck",
    "mezo",
}
"""Rows that differ from another by one option, or by what is trained alone."""


def rows(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.fixture(scope="module")
def opened(tiny_encoder: Path, tiny_texts: Path) -> Callable[[str], Session]:
    @cache
    def open_once(name: str) -> Session:
        session = session_for(tiny_encoder, tiny_texts, **METHODS[name])
        start(session)
        return session

    return open_once


@pytest.fixture(params=rows(METHODS))
def session(request: pytest.FixtureRequest, opened: Callable[[str], Session]) -> Session:
    return opened(request.param)


@pytest.fixture(params=rows(AVERAGING))
def averaging(request: pytest.FixtureRequest, opened: Callable[[str], Session]) -> Session:
    return opened(request.param)


@pytest.fixture(params=rows(AT_ONCE))
def at_once(request: pytest.FixtureRequest, opened: Callable[[str], Session]) -> Session:
    return opened(request.param)


def asked(session: Session, state: State) -> Exchange:
    exchange = session.method.plan(state, session.method.begin(state, state.version + 1))
    assert isinstance(exchange, Exchange)
    return exchange


def test_every_node_derives_the_same_start(session: Session) -> None:
    again = Session(session.config)
    assert fingerprint(again.initial) == fingerprint(session.initial)
    assert isinstance(
        session.method.plan(start(session), session.method.begin(start(session), 0)), Commit | Exchange
    )


@pytest.fixture(scope="module")
def trained(opened: Callable[[str], Session]) -> Callable[[str], State]:
    """The state after two rounds with three of the four clients, by name; leave it as it is."""

    @cache
    def train_once(name: str) -> State:
        return federate(opened(name), start(opened(name)), 2, (0, 1, 3))

    return train_once


@pytest.fixture
def after(request: pytest.FixtureRequest, session: Session, trained: Callable[[str], State]) -> State:
    return trained(request.node.callspec.params["session"])


def test_answer_is_what_the_spec_says_and_is_repeatable(session: Session, after: State) -> None:
    exchange = asked(session, after)
    for node in (1, 2):
        answers = [ask(session, after, exchange, node, 3) for _ in range(2 if node == 2 else 1)]
        assert spec_of(answers[0].tensors) == session.method.expected(
            exchange, session.method.view(after.tensors, node), node
        )
        assert len({fingerprint(answer.tensors) for answer in answers}) == 1
        assert any(t.count_nonzero() for t in answers[0].tensors.values())
        assert answers[0].examples == len(session.client_tokens(node)[0])
        assert answers[0].passes.forward > 0


def test_arrival_order_does_not_change_a_bit(session: Session, after: State) -> None:
    backward = federate(session, start(session), 2, (3, 0, 1))
    assert fingerprint(after.tensors) == fingerprint(backward.tensors)
    assert fingerprint(after.memory) == fingerprint(backward.memory)
    assert fingerprint(after.tensors) != fingerprint(start(session).tensors)


def test_commit_keeps_names_shapes_and_types_and_the_state_it_started_from(
    session: Session, after: State
) -> None:
    before = fingerprint(after.tensors), fingerprint(after.memory)
    later = federate(session, after, 1, (2,), first=3)
    assert spec_of(later.tensors) == spec_of(start(session).tensors)
    assert all(t.isfinite().all() for t in later.tensors.values())
    assert (fingerprint(after.tensors), fingerprint(after.memory)) == before


def test_state_survives_a_checkpoint(session: Session, after: State) -> None:
    stored = State(after.version, load(save(after.tensors)), load(save(after.memory)))
    straight, resumed = (federate(session, s, 1, (2,), first=3) for s in (after, stored))
    assert fingerprint(straight.tensors) == fingerprint(resumed.tensors)
    assert fingerprint(straight.memory) == fingerprint(resumed.memory)


def test_round_zero_without_setup_changes_nothing(at_once: Session) -> None:
    state = start(at_once)
    assert at_once.method.plan(state, at_once.method.begin(state, 0)) == Commit()
    after = commit(at_once, state, 0, "setup", [])
    assert fingerprint(after.tensors) == fingerprint(state.tensors)


def test_one_client_alone_is_plain_training(averaging: Session) -> None:
    state = federate(averaging, start(averaging), 1, (2,))
    exchange = asked(averaging, state)
    answer = ask(averaging, state, exchange, 2, 2)
    alone = logits(averaging)
    after = commit(averaging, state, 2, exchange.kind, [reply_of(answer, 2)])
    torch.testing.assert_close(logits(averaging, after.tensors), alone, rtol=1e-4, atol=1e-5)
    assert (logits(averaging, state.tensors) - alone).abs().max() > 1e-3


def test_a_reply_of_three_times_the_examples_counts_as_three(averaging: Session) -> None:
    state = start(averaging)
    exchange = asked(averaging, state)
    ours, theirs = (ask(averaging, state, exchange, node) for node in (2, 1))
    # Nodes of one rank: what a reply's tensors look like depends on who sent it.
    heavy = commit(averaging, state, 1, "fit", [reply_of(ours, 2, 30), reply_of(theirs, 1, 10)])
    many = commit(
        averaging, state, 1, "fit", [*(reply_of(ours, n, 10) for n in (2, 5, 6)), reply_of(theirs, 1, 10)]
    )
    equal = commit(averaging, state, 1, "fit", [reply_of(ours, 2, 10), reply_of(theirs, 1, 10)])
    told = [logits(averaging, s.tensors) for s in (heavy, many, equal)]
    torch.testing.assert_close(told[0], told[1], rtol=1e-4, atol=1e-5)
    assert (told[0] - told[2]).abs().max() > 1e-3
