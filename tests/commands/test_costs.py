"""What runs will take is said before they start, from what their presets took."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedllm.config import RunConfig
from fedllm.presets import Cost, document, origin, presets
from simulations import costs
from simulations.experiment import plan
from strategies.registry import resolve_run

MEASURED = {preset.name: preset.cost for preset in presets() if preset.cost is not None}


def quickstart(*overrides: str) -> tuple[str, RunConfig]:
    return "quickstart", resolve_run(document("quickstart"), overrides)


def test_costs_of_a_preset_are_read_from_its_file() -> None:
    found = {preset.name: preset for preset in presets()}["quickstart"]
    written = re.search(r"([\d.]+) GB of memory, ([\d.]+) MB of disk", found.costs)
    assert written is not None
    assert found.cost is not None
    assert found.cost.memory == pytest.approx(float(written[1]) * 1e9)
    assert found.cost.disk == pytest.approx(float(written[2]) * 1e6)


UNMEASURED = ("entities", "fedkd-literal", "fwdllm-backprop", "own", "teacher-local")
"""Presets that nobody has run alone on one core with a clock beside them, or that depend on one's texts."""


def test_every_other_preset_has_costs() -> None:
    assert {preset.name for preset in presets()} == {*MEASURED, *UNMEASURED}


def test_twice_the_rounds_are_twice_the_time_and_no_more_memory_or_disk() -> None:
    one = costs.forecast([quickstart("rounds=8")]).cost
    two = costs.forecast([quickstart("rounds=16")]).cost
    assert one == MEASURED["quickstart"]
    assert (two.seconds, two.memory, two.disk) == (2 * one.seconds, one.memory, one.disk)


def test_runs_one_after_the_other_add_time_and_disk_and_share_memory() -> None:
    one = costs.forecast([quickstart()]).cost
    three = costs.forecast([quickstart()] * 3)
    assert three.cost == Cost(3 * one.seconds, one.memory, 3 * one.disk)
    assert three.large


def test_a_precision_settled_at_the_start_is_like_its_preset() -> None:
    assert costs.forecast([quickstart("model.dtype=bfloat16")]).cost == MEASURED["quickstart"]


@pytest.mark.parametrize("other", ["model.name=roberta-base", "data.name=ag_news", "tuning.rank=64"])
def test_another_model_or_other_data_has_no_estimate(tmp_path: Path, other: str) -> None:
    said = costs.forecast([quickstart(other)])
    assert said.unknown == ("quickstart",)
    assert costs.sentences(said, tmp_path) == [
        "1 run: no estimate of time, memory and disk, since nothing like quickstart was measured"
    ]


def test_baselines_do_the_work_of_the_federation_together() -> None:
    federation = plan(document("quickstart"), [])[0].config
    alone = plan(document("quickstart"), [], baseline="local")
    assert sum(costs.work(run.config) for run in alone) == costs.work(federation)


def test_a_machine_with_less_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = costs.Forecast(2, Cost(600.0, 1e18, 1e18), ())
    told = costs.sentences(said, tmp_path / "not" / "there")
    assert costs.sentences(said, tmp_path, jobs=2)[0].startswith("2 runs: about 5 min on 2 cores, ")
    assert told[0] == "2 runs: about 10 min on one core, 1000000 TB of memory and 1000000 TB of disk"
    assert re.fullmatch(rf"warning: only .* of disk are free at {tmp_path}", told[1])
    assert re.fullmatch(r"warning: only .* of memory are free", told[2])
    small = costs.Forecast(2, Cost(600.0, 1.0, 1.0), ("smollm2",))
    (told_once,) = costs.sentences(small, tmp_path)
    assert told_once.endswith("; without smollm2, of which nothing like it was measured")


def test_a_file_is_like_the_preset_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "lora-30x"\n')
    (tmp_path / "other.toml").write_text("seed = 3\n")
    assert origin(str(tmp_path / "mine.toml")) == "lora-30x"
    assert origin(str(tmp_path / "other.toml")) == str(tmp_path / "other.toml")
    assert origin("quickstart") == "quickstart"
