"""Rows that every federated method must pass, on a tiny model. A new method adds itself to METHODS."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fedllm.tensors import fingerprint, spec_of
from strategies.base import Commit, Exchange, State
from strategies.workshop import Workshop
from tests.conformance.federation import ask, commit, federate, logits, reply_of, start, workshop

SMALL = ("bitfit", "bottleneck")
LORA_RULES = ("fedit", "ffa", "alternate", "svd", "stack", "residual", "hetero")
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg"},
    **{f"lora-{rule}": {"method": "lora", "options": {"rule": rule}} for rule in LORA_RULES},
    **{
        f"lora-{rule}-mixed": {"method": "lora", "options": {"rule": rule, "ranks": (1, 2, 4, 3)}}
        for rule in ("svd", "stack", "hetero")
    },
    **{f"lora-{peft}": {"method": "lora", "tuning": {"peft": peft, "rank": 4}} for peft in SMALL},
}
AVERAGING = tuple(METHODS)
"""Methods whose round is a weighted mean of what clients trained."""
FORWARD = {"tuning": {"rank": 1, "targets": ("query",)}}
METHODS |= {
    "fwdllm": {"method": "fwdllm", "options": {"directions": 6}, **FORWARD},
    "fwdllm-antithetic": {"method": "fwdllm", "options": {"estimator": "antithetic"}, **FORWARD},
    "fwdllm-dense": {"method": "fwdllm", "options": {"upload": "dense"}, **FORWARD},
    "fwdllm-chosen": {"method": "fwdllm", "options": {"candidates": 4}, **FORWARD},
    "fwdllm-warm": {"method": "fwdllm", "options": {"warm_start": "means", "pacing": "ratio"}, **FORWARD},
    **{f"fwdllm-{peft}": {"method": "fwdllm", "tuning": {"peft": peft, "rank": 1}} for peft in SMALL},
    "mezo": {"method": "mezo", **FORWARD},
    "fedkseed": {"method": "mezo", "options": {"candidates": 16}, **FORWARD},
    "fedkd": {"method": "fedkd"},
}


@pytest.fixture(scope="module")
def opened(tiny_encoder: Path, tiny_texts: Path) -> Callable[[str], Workshop]:
    @cache
    def open_once(name: str) -> Workshop:
        shop = workshop(tiny_encoder, tiny_texts, **METHODS[name])
        start(shop)
        return shop

    return open_once


@pytest.fixture(params=METHODS)
def shop(request: pytest.FixtureRequest, opened: Callable[[str], Workshop]) -> Workshop:
    return opened(request.param)


@pytest.fixture(params=AVERAGING)
def averaging(request: pytest.FixtureRequest, opened: Callable[[str], Workshop]) -> Workshop:
    return opened(request.param)


def asked(shop: Workshop, state: State) -> Exchange:
    exchange = shop.method.plan(state, shop.method.begin(state, state.version + 1))
    assert isinstance(exchange, Exchange)
    return exchange


def test_every_node_derives_the_same_start(shop: Workshop) -> None:
    again = Workshop(shop.config)
    assert fingerprint(again.initial) == fingerprint(shop.initial)
    assert isinstance(shop.method.plan(start(shop), shop.method.begin(start(shop), 0)), Commit | Exchange)


def test_answer_is_what_the_spec_says_and_is_repeatable(shop: Workshop) -> None:
    state = federate(shop, start(shop), 1, (0, 2))
    exchange = asked(shop, state)
    for node in (1, 2):
        first, second = ask(shop, state, exchange, node, 2), ask(shop, state, exchange, node, 2)
        assert spec_of(first.tensors) == shop.method.spec(exchange, shop.method.view(state.tensors, node))
        assert fingerprint(first.tensors) == fingerprint(second.tensors)
        assert any(t.count_nonzero() for t in first.tensors.values())
        assert first.examples == len(shop.client_tokens(node)[0])
        assert first.passes.forward > 0


def test_arrival_order_does_not_change_a_bit(shop: Workshop) -> None:
    forward, backward = (federate(shop, start(shop), 3, nodes) for nodes in ((0, 1, 3), (3, 0, 1)))
    assert fingerprint(forward.tensors) == fingerprint(backward.tensors)
    assert fingerprint(forward.memory) == fingerprint(backward.memory)
    assert fingerprint(forward.tensors) != fingerprint(start(shop).tensors)


def test_commit_keeps_names_shapes_and_types_and_the_state_it_started_from(shop: Workshop) -> None:
    state = start(shop)
    before = fingerprint(state.tensors)
    after = federate(shop, state, 2, (0, 1, 2, 3))
    assert spec_of(after.tensors) == spec_of(state.tensors)
    assert all(t.isfinite().all() for t in after.tensors.values())
    assert fingerprint(state.tensors) == before


def test_state_survives_a_checkpoint(shop: Workshop) -> None:
    state = federate(shop, start(shop), 1, (0, 1))
    stored = State(state.version, load(save(state.tensors)), load(save(state.memory)))
    straight, resumed = (federate(shop, s, 1, (2, 1), first=2) for s in (state, stored))
    assert fingerprint(straight.tensors) == fingerprint(resumed.tensors)


def test_round_zero_without_setup_changes_nothing(averaging: Workshop) -> None:
    state = start(averaging)
    assert averaging.method.plan(state, averaging.method.begin(state, 0)) == Commit()
    after = commit(averaging, state, 0, "setup", [])
    assert fingerprint(after.tensors) == fingerprint(state.tensors)


def test_one_client_alone_is_plain_training(averaging: Workshop) -> None:
    state = federate(averaging, start(averaging), 1, (2,))
    exchange = asked(averaging, state)
    answer = ask(averaging, state, exchange, 2, 2)
    trained = logits(averaging)
    after = commit(averaging, state, 2, exchange.kind, [reply_of(answer, 2)])
    torch.testing.assert_close(logits(averaging, after.tensors), trained, rtol=1e-4, atol=1e-5)
    assert (logits(averaging, state.tensors) - trained).abs().max() > 1e-3


def test_a_reply_of_three_times_the_examples_counts_as_three(averaging: Workshop) -> None:
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
