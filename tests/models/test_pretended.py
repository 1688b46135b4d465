"""Every tensor follows the model's device: forward-only runs on one that refuses tensors from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.models import model as models
from simulations.results.predict import export, predict
from strategies.session import forget_sessions
from tests.pretended import DEVICE, Pretended, There
from tests.rounds.federation import configuration, run

METHODS: dict[str, dict[str, Any]] = {
    "fwdllm": {
        "method": "fwdllm",
        "options": {"directions": 2, "warm_start": "means", "estimator": "antithetic"},
    },
    "mezo": {"method": "mezo"},
}
"""Not those with fused AdamW, which knows devices by name, nor jvp, which a wrapped tensor does not carry."""


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(models, "chosen_device", lambda: DEVICE)
    # Inference tensors keep no count of their versions, which wrapped ones need.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    forget_sessions()
    with Pretended():
        yield
    forget_sessions()


def test_the_pretended_device_refuses_tensors_from_elsewhere() -> None:
    with Pretended():
        there, here = torch.ones(3).to(DEVICE), torch.ones(3)
        assert isinstance(there, There)
        assert there.device == DEVICE
        with pytest.raises(RuntimeError, match="on one device"):
            _ = there + here
        assert float((there + here.to(DEVICE)).sum()) == 6.0
        assert torch.equal((there * 2).cpu(), torch.full((3,), 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_and_its_answers_stay_on_one_device(
    pretended: None, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, name: str
) -> None:
    config = configuration(tiny_encoder, tiny_texts, rounds=1, clients=2, server={}, **METHODS[name])
    assert run(config, tmp_path / "run")["status"] == "finished"
    answers = predict(tmp_path / "run", ["one old apple", "iron near the copper and zinc"])
    export(tmp_path / "run", tmp_path / "out")
    assert all(sum(answer["probabilities"].values()) == pytest.approx(1.0) for answer in answers)
