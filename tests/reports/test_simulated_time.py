"""Time on simulated devices, wherever people look for it: every round below takes them a minute."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fedllm.terminal.live import Watcher
from server.dashboard.pages import charts
from simulations.results import plots, report
from simulations.results.compare import compare, draw, table
from tests.reports.made_up import make_run


def test_a_curve_by_simulated_time_goes_through_what_was_measured(tmp_path: Path) -> None:
    rounds = make_run(tmp_path / "run", simulated=60.0).rounds()
    (line,) = plots.curves({"run": rounds}, "accuracy", "simulated").axes[0].get_lines()
    assert list(line.get_xdata()) == [60.0, 120.0, 180.0]
    (series,) = charts.quality(rounds, "accuracy", "simulated")["series"]
    assert series["data"] == [[60.0, 0.5], [120.0, 0.7], [180.0, 0.9]]


def test_the_axis_is_offered_where_all_runs_have_it(tmp_path: Path) -> None:
    with_it = make_run(tmp_path / "with", simulated=60.0).rounds()
    without = make_run(tmp_path / "without").rounds()
    assert plots.axes_of([with_it]) == ("round", "bytes", "seconds", "simulated")
    assert plots.axes_of([with_it, without]) == plots.axes_of([without]) == ("round", "bytes", "seconds")
    assert charts.axes(with_it) == ["round", "bytes", "seconds", "simulated"]
    assert charts.axes(without) == ["round", "bytes", "seconds"]


@pytest.mark.slow
def test_the_report_says_when_the_best_was_reached(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (0.5, 0.9, 0.7), simulated=60.0)
    page = report.render(run, report._figures(run))
    assert "<dt>Simulated time</dt><dd>3 min</dd><p>best accuracy after 2 min</p>" in page
    assert "Accuracy by simulated time" in page
    plain = make_run(tmp_path / "plain")
    assert "imulated" not in report.render(plain, {})


@pytest.mark.parametrize(
    ("second", "said"), [pytest.param(30.0, "1 min 30 s", marks=pytest.mark.slow), (None, "6.00 s")]
)
def test_a_comparison_tells_devices_time_where_all_have_it(
    second: float | None, said: str, tmp_path: Path
) -> None:
    folders = [make_run(tmp_path / "a", simulated=60.0).folder]
    folders.append(make_run(tmp_path / "b", simulated=second, codec={"up": "quantize(bits=8)"}).folder)
    found = compare(folders)
    assert [row["seconds_simulated"] for row in found["settings"]] == [180.0, second and 3 * second]
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(table(found))
    assert ("simulated" in (text := console.export_text())) == (second is not None)
    if second is not None:
        assert said in text
        assert "accuracy-simulated.png" in {path.name for path in draw(folders, tmp_path / "plots")}


def test_files_and_terminal_tell_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", simulated=60.0)
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["seconds_simulated"] for line in lines] == [60.0] * 3
    assert json.loads((run.folder / "summary.json").read_text())["seconds"]["simulated"] == 180.0
    console = Console(width=150, record=True, file=io.StringIO())
    with Watcher(console) as watcher:
        watcher.update(run.folder)
        watcher.update(run.folder)
    assert "2.0 s (1 min simulated)" in console.export_text()
