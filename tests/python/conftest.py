"""A small run as a program would make it, from texts that it has in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm


@pytest.fixture(scope="session")
def small(tiny_encoder: Path) -> dict[str, Any]:
    """Settings of a run of two rounds that takes a moment."""
    return {
        "settings": {
            "data.max_length": 16,
            "tuning": {"rank": 2, "targets": ["query", "value"]},
            "training": {"local_steps": 1, "batch_size": 4, "learning_rate": 0.05},
        },
        "model": tiny_encoder,
        "clients": 2,
        "rounds": 2,
        "threads": 1,
        "report": False,
        "progress": False,
    }


@pytest.fixture(scope="session")
def finished(
    small: dict[str, Any], rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> fedllm.Run:
    """A finished run, made from texts in memory; leave it as it is."""
    return fedllm.simulate(out=tmp_path_factory.mktemp("finished") / "run", data=rows, **small)
