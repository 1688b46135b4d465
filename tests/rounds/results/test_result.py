"""What lies in the run folder at the end is what the last round committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedllm.runs import checkpoint
from fedllm.tensors import Tensors
from strategies.session import open_session
from tests.rounds.federation import configuration, run

WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({}, "adapter/adapter_model.safetensors"),
    "model": ({"method": "fedavg"}, "model/model.safetensors"),
}


def closest(values: torch.Tensor, tensors: Tensors) -> float:
    """Least distance to any tensor of the same shape."""
    return min(float((values - t).abs().max()) for t in tensors.values() if t.shape == values.shape)


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_last_commit_is_what_is_written(
    kind: str, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    sections, file = WRITTEN[kind]
    config = configuration(
        tiny_encoder, tiny_texts, clients=2, rounds=1, server={}, evaluation={"every": 0}, **sections
    )
    run(config, tmp_path / "run")
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    committed = saved.groups["tensors"]
    initial = open_session(config.to_json()).initial
    folder = (tmp_path / "run" / file).parent
    written = load_file(tmp_path / "run" / file) | load_file(folder / "head.safetensors")
    assert len(written) == len(committed)
    for values in written.values():
        assert closest(values, committed) == 0.0
    moved = [name for name, value in committed.items() if not torch.equal(value, initial[name])]
    assert moved
    for name in moved:
        assert closest(committed[name], dict(enumerate(written.values()))) == 0.0  # type: ignore[arg-type]
