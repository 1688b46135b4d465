"""Plots show the numbers of the run, and need no other plot's state."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from simulations import plots
from tests.reports.made_up import make_run


@pytest.mark.parametrize(
    ("against", "places"),
    # each round: 2 x 100 up and 2 x 300 down, 2 seconds
    [("round", [1, 2, 3]), ("bytes", [0.0008, 0.0016, 0.0024]), ("seconds", [2, 4, 6])],
)
def test_a_curve_goes_through_what_was_measured(
    tmp_path: Path, against: plots.Against, places: list[float]
) -> None:
    run = make_run(tmp_path / "run")
    (line,) = plots.curves({"run": run.rounds()}, "accuracy", against).axes[0].get_lines()
    assert np.allclose(line.get_xdata(), places)
    assert np.allclose(line.get_ydata(), [0.5, 0.7, 0.9])


def test_rounds_without_the_metric_still_cost_bytes(tmp_path: Path) -> None:
    first, second, third = make_run(tmp_path / "run").rounds()
    rounds = [first, dataclasses.replace(second, metrics={}), third]
    x, y = plots.progress(rounds, "accuracy", "bytes")
    assert x == pytest.approx([0.0008, 0.0024])
    assert y == [0.5, 0.9]


def test_repeats_show_mean_and_range(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(s), (0.5, 0.6 + s / 10), seed=s).rounds() for s in (0, 1)]
    axes = plots.repeated({"both": runs}).axes[0]
    assert np.allclose(axes.get_lines()[0].get_ydata(), [0.5, 0.65])
    corners = axes.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.5, 0.7)


def test_traffic_bars_are_megabytes_up_and_down(tmp_path: Path) -> None:
    axes = plots.traffic(make_run(tmp_path / "run").rounds()).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.0002] * 3 + [0.0006] * 3)
    many = make_run(tmp_path / "many", (0.5,) * 61).rounds()
    assert not plots.traffic(many).axes[0].patches


def test_partition_stacks_are_client_sizes() -> None:
    clients = [{"node": n, "examples": 3 * n, "labels": [n, 2 * n]} for n in range(4)]
    axes = plots.partition({"label_names": ["a", "b"], "clients": clients}).axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches[4:]]
    assert tops == [0, 3, 6, 9]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_many_classes_share_the_last_colour_and_lose_no_text() -> None:
    counts = np.random.default_rng(0).integers(0, 9, size=(70, 20))
    clients = [{"node": n, "examples": int(c.sum()), "labels": c.tolist()} for n, c in enumerate(counts)]
    axes = plots.partition({"label_names": [f"class {i}" for i in range(20)], "clients": clients}).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == counts.sum()
    assert axes.get_legend().get_texts()[-1].get_text() == "13 others"


def test_a_partition_without_classes_shows_sizes() -> None:
    clients = [{"node": n, "examples": n, "labels": None} for n in range(3)]
    axes = plots.partition({"label_names": [], "clients": clients}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0, 1, 2]
    assert axes.get_legend() is None


def test_svg_is_sound_xml_with_ids_of_its_own(tmp_path: Path) -> None:
    figure = plots.traffic(make_run(tmp_path / "run").rounds())
    text = plots.svg(figure, "traffic")
    root = ET.fromstring(text)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids
    assert all(name is not None and name.startswith("traffic-") for name in ids)
    references = [v for e in root.iter() for k, v in e.items() if k.endswith("href") or v.startswith("url(")]
    assert references
    assert {r.removeprefix("url(").strip("#)") for r in references} <= set(ids)
    assert plots.svg(figure, "traffic") == text


def test_data_uri_is_a_png(tmp_path: Path) -> None:
    figure = plots.traffic(make_run(tmp_path / "run").rounds())
    assert plots.data_uri(figure).startswith("data:image/png;base64,iVBORw0KGgo")


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, simulations.report, simulations.compare; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
