"""Differential privacy on every engine: a run that began on one goes on with the same bits on another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from simulations.engines.flower import simulate as on_flower
from simulations.engines.loopback import simulate as in_process
from tests.rounds.federation import configuration

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NOISED = {"clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-3}


@pytest.mark.parametrize(
    "privacy",
    [{**NOISED, "clip_quantile": 0.5}, {**NOISED, "secure_aggregation": True}, {**NOISED, "unit": "example"}],
    ids=["of the server", "of clients", "on steps"],
)
def test_noise_is_the_same_on_every_engine(
    privacy: dict[str, Any], tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Secrets lie in the run's folder: who computes the last round anew from a copy has the same noise."""
    config = configuration(tiny_encoder, tiny_texts, rounds=2, server={"sample": 4}, privacy=privacy)
    in_process(config, tmp_path / "alone")
    whole = Run(tmp_path / "alone").summary
    assert whole["status"] == "finished"
    assert whole["privacy"]["epsilon"] > 0
    for name, engine in {"pool": in_process, "flower": on_flower}.items():
        shutil.copytree(tmp_path / "alone", tmp_path / name)
        for place in (tmp_path / name / "checkpoints").glob("*2*"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        saved = checkpoint.latest(tmp_path / name / "checkpoints")
        assert saved is not None
        assert saved.number == 1
        engine(config, tmp_path / name, workers=2)
        again = Run(tmp_path / name).summary
        assert again["state_sha256"] == whole["state_sha256"]
        assert again["privacy"] == whole["privacy"]
