"""A run in which nothing moves says so instead of finishing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedllm.errors import RunFailed
from tests.rounds.federation import configuration, run


def test_a_round_that_moves_nothing_ends_the_run(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    steps = {"local_steps": 1, "batch_size": 4, "optimizer": "sgd", "learning_rate": 1e-60}
    config = configuration(tiny_encoder, tiny_texts, method="lora", training=steps)
    with pytest.raises(RunFailed, match="round 1 moved nothing"):
        run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
