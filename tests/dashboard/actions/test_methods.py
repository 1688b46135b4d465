"""What is particular to a method: its own curves, and going back where clients keep tensors of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedllm.config import RunConfig
from fedllm.runs.reader import Run
from server.dashboard.actions.launch import Launcher
from server.dashboard.actions.operations import Operations
from server.dashboard.door.access import Principal
from server.dashboard.pages import charts
from server.dashboard.reading.runs import RunIndex
from tests.parts import quick
from tests.rounds.federation import configuration
from tests.rounds.federation import run as simulate

LOW_RANK = 'error_feedback(low_rank(energy="0.8->0.99") | quantize(bits=8))'
SECTIONS: dict[str, dict[str, Any]] = {
    "fwdllm": {"options": {"directions": 4, "pacing": "variance", "threshold": 1e-9, "max_exchanges": 2}},
    "fedkd": {"codec": {"up": LOW_RANK, "down": LOW_RANK}},
}


@pytest.fixture
def config(method: str, tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    return configuration(tiny_encoder, tiny_texts, method=method, rounds=3, clients=3, **SECTIONS[method])


@pytest.mark.slow
@pytest.mark.parametrize("method", quick(SECTIONS, "fwdllm"))
def test_what_a_method_reports_is_drawn(config: RunConfig, tmp_path: Path) -> None:
    simulate(config, tmp_path / "runs" / "a")
    index = RunIndex(tmp_path / "runs")
    rounds = index.rounds("a")

    def curve(name: str) -> list[float]:
        return [value for _, value in charts.facts(rounds, name)["series"][0]["data"]]

    names = charts.fact_names(rounds)
    if config.method == "fwdllm":
        assert names[:3] == ["directions, variance", "directions", "variance"]
        both = charts.facts(rounds, names[0])["series"]
        assert [(one["name"], one.get("yAxisIndex", 0)) for one in both] == [
            ("directions", 0),
            ("variance", 1),
        ]
        # Three clients with four directions each, asked twice since no variance is as small as that.
        assert curve("directions") == [24.0, 24.0, 24.0]
        assert min(curve("variance")) > 1e-9
    else:
        assert names[:4] == ["energy, rank", "energy", "rank", "loss"]
        # T(t) = 0.8 + 0.19 t at t = 0, 1/3 and 2/3.
        assert curve("energy") == pytest.approx([0.8, 0.8 + 0.19 / 3, 0.8 + 0.38 / 3])
        assert min(curve("rank")) >= 1.0
        up, down = (one["data"] for one in charts.compression(index.traffic("a"))["series"])
        assert [number for number, _ in up] == [1, 2, 3]
        assert min(ratio for _, ratio in up[1:] + down[2:]) > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("method", SECTIONS)
def test_going_back_comes_out_as_if_nothing_had_been(
    config: RunConfig, ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ops.root / "a"
    simulate(config, folder)
    before = Run(folder).rounds()
    monkeypatch.setattr(Launcher, "go_on", lambda self, name: simulate(config, self.root / name))
    ops.go_on(Principal("olive", "operator"), "a", config.rounds - 1)
    after = Run(folder).rounds()
    assert [record.state_sha256 for record in after] == [record.state_sha256 for record in before]
    assert after[-1].finished_at > before[-1].finished_at
    if config.method == "fedkd":
        assert not [row for row in Run(folder).nodes() if "state_lost" in row.metrics]
