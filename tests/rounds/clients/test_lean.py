"""Runs that keep little for the backward pass learn what others learn, and go on as they would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from fedllm.config import RunConfig
from strategies import session as session
from tests.rounds.federation import configuration, run

pytestmark = pytest.mark.slow

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "tuning": {"rank": 2, "targets": ("q_proj", "lm_head")}},
    "fedavg": {"method": "fedavg", "tuning": {"peft": "full"}},
}
FILES = {"lora": Path("adapter", "adapter_model.safetensors"), "fedavg": Path("model", "model.safetensors")}


def config_of(way: str, base: Path, texts: Path, memory: str) -> RunConfig:
    training = {"local_steps": 2, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1, "memory": memory}
    model = {"name": str(base), "task": "causal", "dropout": 0.1}
    return configuration(base, texts, model=model, training=training, rounds=2, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_a_lean_run_learns_what_a_plain_one_does(
    tiny_causal: Path, tiny_texts: Path, tmp_path: Path, way: str
) -> None:
    tensors = []
    for memory in ("plain", "lean"):
        run(config_of(way, tiny_causal, tiny_texts, memory), tmp_path / memory)
        tensors.append(load_file(tmp_path / memory / FILES[way]))
    plain, lean = tensors
    for name, tensor in plain.items():
        torch.testing.assert_close(lean[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_a_stopped_lean_run_goes_on_to_the_same_bits(
    tiny_causal: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config, replies = config_of("lora", tiny_causal, tiny_texts, "lean"), 0

    def stop(reply: Message) -> Message:
        nonlocal replies
        replies += 1
        if replies == 5:
            raise KeyboardInterrupt
        return reply

    undisturbed = run(config, tmp_path / "undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", stop)
    session.forget_sessions()  # as in another process
    assert run(config, tmp_path / "stopped")["state_sha256"] == undisturbed["state_sha256"]
