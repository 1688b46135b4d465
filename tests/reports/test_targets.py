"""``fedllm bench all``: every goal beside what was measured, and what was measured is kept."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedllm.errors import ConfigError, RunFailed
from simulations.bench import BENCHMARKS, targets


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What benchmarks return here, or raise."""
    returned: dict[str, Any] = {}

    def bench(name: str) -> SimpleNamespace:
        def run() -> Any:
            found = returned[name.rpartition(".")[2]]
            if isinstance(found, Exception):
                raise found
            return found

        return SimpleNamespace(run=run)

    monkeypatch.setattr(targets, "import_module", bench)
    return returned


def test_every_target_is_about_a_benchmark_that_there_is() -> None:
    assert set(targets.BENCHES) <= set(BENCHMARKS)
    for name in targets.BENCHES:
        assert callable(importlib.import_module(f"simulations.bench.{name}").run)


def test_a_goal_is_met_or_missed_by_a_share_of_it(benches: dict[str, Any], tmp_path: Path) -> None:
    benches["deployment"] = {"overhead_ratio_to_stock": 0.25, "seconds_above_idle": 0.84}
    ratio, above = targets.judge(tmp_path, ["deployment"])
    assert (ratio["value"], ratio["goal"], ratio["verdict"]) == (0.25, "at most 0.25", "met")
    assert (above["value"], above["verdict"]) == (0.84, "missed by 20% of the goal")


def test_more_is_better_where_the_goal_says_at_least(benches: dict[str, Any], tmp_path: Path) -> None:
    benches["aggregation"] = {"svd": {"speedup": 75.0}, "exactness": {}, "memory": {"fedit": {}}}
    found = {row["what"]: row for row in targets.judge(tmp_path, ["aggregation"])}
    assert found["factored against dense SVD: speed-up"]["verdict"] == "missed by 25% of the goal"
    lacking = found["rule ffa: relative error to the dense sum"]
    assert lacking["value"] is None
    assert lacking["verdict"] == "not measured: aggregation printed no exactness / ffa / relative_error here"


def test_bytes_are_told_in_the_unit_of_the_goal(benches: dict[str, Any], tmp_path: Path) -> None:
    held = {"bytes": 249_000_000, "worker_bytes": 451_000_000}
    benches["device"] = dict.fromkeys(("idle", "lora", "fwdllm", "fedkd"), held)
    idle, lora, *_ = targets.judge(tmp_path, ["device"])
    assert (idle["value"], idle["verdict"]) == (249.0, "met")
    assert lora["verdict"].startswith("missed by 0% of the goal")


def test_what_was_measured_is_kept_and_a_failure_is_not(benches: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    benches["distill"] = RunFailed("no such luck")
    (failed,) = targets.judge(tmp_path, ["distill"], report=said.append)
    assert (failed["value"], failed["verdict"]) == (None, "not measured: no such luck")
    benches["distill"] = {"3 layers": {"ratio": 1.5}}
    (first,) = targets.judge(tmp_path, ["distill"])
    benches["distill"] = {"3 layers": {"ratio": 3.2}}
    (kept,) = targets.judge(tmp_path, ["distill"], report=said.append)
    assert kept == first
    assert said[-1] == f"distill: measured at {first['measured_at']}, in {tmp_path / 'distill.json'}"
    (again,) = targets.judge(tmp_path, ["distill"], fresh=True)
    assert again["verdict"] == "missed by 100% of the goal"


def test_an_unknown_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no target is about 'speed'; there are simulation, memory"):
        targets.judge(tmp_path, ["speed"])
