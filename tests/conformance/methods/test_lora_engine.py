"""The engine does to LoRA's rules what the plain loop does: to the bit, shapes of each node included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.tensors import fingerprint
from simulations.engines.loopback import simulate
from tests.conformance.federation import federate, session_for, start

RULES: tuple[dict[str, Any], ...] = (
    {"rule": "alternate"},
    {"rule": "svd", "ranks": (1, 2, 4, 3)},
    {"rule": "stack"},
    {"rule": "residual", "base_rank": 8},
    {"rule": "fed-sb"},
)


@pytest.mark.slow
@pytest.mark.parametrize("options", RULES, ids=lambda options: options["rule"])
def test_engine_and_plain_loop_agree(
    options: dict[str, Any], tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    session = session_for(tiny_encoder, tiny_texts, "lora", options=options, rounds=3)
    state = start(session)
    if options["rule"] == "fed-sb":
        state = federate(session, state, 1, (2, 0, 3, 1), first=0)
    state = federate(session, state, 3, (3, 1, 0, 2))
    simulate(session.config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["failures"], summary["rejected"]) == ("finished", 0, 0)
    assert summary["state_sha256"] == fingerprint(state.tensors)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
