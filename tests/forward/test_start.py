"""Forward-only methods on tensors that start at zero, or that several layers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedllm.models.functional import call
from strategies.base import State
from strategies.session import Session
from tests.conformance.federation import federate, session_for, start
from tests.parts import quick

METHODS: dict[str, dict[str, Any]] = {
    "fwdllm": {"method": "fwdllm", "options": {"directions": 4}},
    "fwdllm-antithetic": {"method": "fwdllm", "options": {"directions": 4, "estimator": "antithetic"}},
    "mezo": {"method": "mezo"},
}
Open = Callable[..., Session]


@pytest.fixture
def opened(tiny_causal: Path, tiny_texts: Path) -> Open:
    def opened(method: str, peft: str) -> Session:
        sections = {
            "model": {"name": str(tiny_causal), "task": "causal"},
            "tuning": {"peft": peft, "rank": 4},
        }
        return session_for(tiny_causal, tiny_texts, **sections | METHODS[method])

    return opened


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


@pytest.mark.parametrize("method", quick(METHODS, "fwdllm"))
@pytest.mark.parametrize("peft", quick(["bitfit", "oft"], "bitfit"))
def test_tensors_that_start_at_zero_move(opened: Open, method: str, peft: str) -> None:
    session = opened(method, peft)
    first = start(session)
    assert norm(first.tensors) == 0.0
    after = federate(session, first, 3, (0, 1))
    assert all(t.any() for t in after.tensors.values())


def test_a_trust_step_from_zero_is_a_share_of_a_fresh_weight(opened: Open) -> None:
    session = opened("fwdllm", "bitfit")
    first = start(session)
    after = federate(session, first, 1, (0, 1))
    entries = sum(t.numel() for t in first.tensors.values())
    assert norm(after.tensors) == pytest.approx(0.1 * 0.02 * math.sqrt(entries), rel=1e-5)
    # The next step has the same measure, not a tenth of the little that the first has made.
    second = federate(session, after, 1, (0, 1), first=2)
    moved = {name: second.tensors[name] - after.tensors[name] for name in after.tensors}
    progress = 1 / session.config.rounds
    rate = 0.1 * (1 - progress**2 * (3 - 2 * progress))
    assert norm(moved) == pytest.approx(rate * 0.02 * math.sqrt(entries), rel=1e-5)


@pytest.mark.parametrize("method", quick(METHODS, "fwdllm"))
@pytest.mark.parametrize("peft", quick(["lily", "tinylora", "unilora"], "unilora"))
def test_tensors_that_layers_share_are_trained(opened: Open, method: str, peft: str) -> None:
    session = opened(method, peft)
    places = [n for n, p in session.model.module.named_parameters(remove_duplicate=False) if p.requires_grad]
    assert len(places) > len(session.model.trainable())
    state: State = federate(session, start(session), 3, (0, 1))
    assert state.tensors.keys() == session.initial.keys() == session.model.trainable().keys()
    assert any(not torch.equal(state.tensors[n], session.initial[n]) for n in state.tensors)


def test_a_call_with_other_values_leaves_a_shared_module_as_it_was() -> None:
    shared, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = shared.weight  # tied in another place
    module = nn.Sequential(shared, other, shared)
    before = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    x, weight = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    values = {"0.weight": weight, "0.bias": torch.zeros(2), "1.bias": torch.zeros(2)}
    torch.testing.assert_close(call(module, values, input=x), x @ weight.T @ weight.T @ weight.T)
    assert {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)} == before
