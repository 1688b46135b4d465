"""The same devices are late on every engine, and a run that was cut short goes on with the same clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedllm.config import RunConfig
from fedllm.runs.reader import Run
from simulations.engines.flower import simulate as on_flower
from simulations.engines.loopback import simulate as in_process
from tests.rounds.federation import configuration, cut, run

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    # Of which a process keeps what its frozen layers make of texts.
    "fwdllm": {
        "method": "fwdllm",
        "tuning": {"peft": "head"},
        "options": {"directions": 4, "parallel": 4, "step": "trust", "warm_start": "means"},
    },
}


@pytest.fixture(params=METHODS)
def config(request: pytest.FixtureRequest, tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    """Boards of which the slow ones miss the deadline, all away now and then; clients evaluate too."""
    fast = {
        "gflops": 1e-1, "efficiency": 0.5, "memory_gb": 1, "down_mbps": 1, "up_mbps": 1,
        "availability": 0.7, "session_s": 40.0,
    }  # fmt: skip
    slow = {**fast, "gflops": 1e-3}
    return configuration(
        tiny_encoder,
        tiny_texts,
        clients=8,
        rounds=4,
        data={"path": str(tiny_texts), "max_length": 16, "client_test_fraction": 0.3},
        server={"sample": 4, "over_select": 2, "quorum": 1, "deadline_s": 2.0},
        evaluation={"clients": True},
        simulation={"profile": {"fast": 5, "slow": 3}, "devices": {"fast": fast, "slow": slow}},
        **METHODS[request.param],
    )


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on who computed it, nor on whether it was cut short.

    Bytes may: what a process has forgotten, or another one of the pool holds, is sent again, in no time.
    """
    told = Run(folder)
    rows = [
        (
            row.round,
            row.attempt,
            row.exchange,
            row.node,
            row.status,
            row.reason,
            row.metrics.get("seconds_simulated"),
        )
        for row in told.nodes()
    ]
    seconds = [record.details["seconds_simulated"] for record in told.rounds()]
    summary = told.summary
    return {
        "rows": sorted(rows),
        "seconds": seconds,
        **{key: summary[key] for key in ("state_sha256", "passes")},
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", ["lora"], indirect=True)
def test_the_slow_ones_are_late(config: RunConfig, tmp_path: Path) -> None:
    run(config, tmp_path / "run")
    told = Run(tmp_path / "run")
    (event,) = (event for event in told.events() if event.kind == "devices")
    assert event.message == "time is simulated: 5 fast, 3 slow"
    devices = event.fields["devices"]
    fits = [row for row in told.nodes() if row.exchange == "fit"]
    late = {row.node for row in fits if row.status == "late"}
    counted = {row.node for row in fits if row.status == "accepted"}
    assert late
    assert {devices[node] for node in late} == {"slow"}
    assert {devices[node] for node in counted} == {"fast"}
    assert told.summary["seconds"]["simulated"] == sum(r.details["seconds_simulated"] for r in told.rounds())


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fwdllm", "lora"], indirect=True)
def test_a_run_that_was_killed_goes_on_with_the_same_clock(config: RunConfig, tmp_path: Path) -> None:
    run(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", 3)
    assert len(Run(tmp_path / "cut").rounds()) == 3
    run(config, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_and_workers_tell_the_same_time(config: RunConfig, tmp_path: Path) -> None:
    in_process(config, tmp_path / "alone")
    in_process(config, tmp_path / "pool", workers=2)
    on_flower(config, tmp_path / "flower", workers=2)
    alone = outcome(tmp_path / "alone")
    assert {"late", "accepted"} <= {status for *_, status, _, _ in alone["rows"]}
    assert outcome(tmp_path / "pool") == alone
    assert outcome(tmp_path / "flower") == alone
