"""Plots show the numbers of the run, and need no other plot's state."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from fedllm.runs.records import RoundRecord
from simulations.results import plots
from simulations.results.compare import compare
from tests.parts import quick
from tests.reports.made_up import make_run


@pytest.mark.parametrize(
    ("against", "places"),
    # each round: 2 x 100 up and 2 x 300 down, 2 seconds
    [("round", [1, 2, 3]), ("bytes", [800, 1600, 2400]), ("seconds", [2, 4, 6])],
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
    assert x == [800, 2400]
    assert y == [0.5, 0.9]


def test_a_band_is_the_interval_that_the_table_states(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(s), (0.1 + s / 10, 0.6 + s / 10), seed=s) for s in (0, 1, 5)]
    axes = plots.repeated({"all": [(run.config.seed, run.rounds()) for run in runs]}, "accuracy").axes[0]
    assert np.allclose(axes.get_lines()[0].get_ydata(), [0.3, 0.8])
    corners = axes.collections[0].get_paths()[0].vertices
    at_the_end = corners[np.isclose(corners[:, 0], 2), 1]
    expected = stats.ttest_1samp([0.6, 0.7, 1.1], 0.0).confidence_interval(0.95)
    assert (at_the_end.min(), at_the_end.max()) == pytest.approx((expected.low, expected.high))
    (row,) = compare([run.folder for run in runs])["settings"]
    assert (row["accuracy"]["low"], row["accuracy"]["high"]) == pytest.approx((expected.low, expected.high))


def test_two_seeds_have_no_band(tmp_path: Path) -> None:
    runs = [(seed, make_run(tmp_path / str(seed), (0.5 + seed / 10,), seed=seed).rounds()) for seed in (0, 1)]
    axes = plots.repeated({"both": runs}, "accuracy").axes[0]
    assert np.allclose(axes.get_lines()[0].get_ydata(), [0.55])
    assert not axes.collections


def test_clients_of_one_seed_are_no_repeats(tmp_path: Path) -> None:
    runs = [
        (seed, make_run(tmp_path / f"{seed}{part}", (0.5 + part / 10 + seed / 100,), seed=seed).rounds())
        for seed in (0, 1, 2)
        for part in (0, 1, 2, 3)
    ]
    figure = plots.repeated({"local": runs}, "accuracy")
    axes = figure.axes[0]
    assert np.allclose(axes.get_lines()[0].get_ydata(), [0.66])
    corners = axes.collections[0].get_paths()[0].vertices
    expected = stats.ttest_1samp([0.65, 0.66, 0.67], 0.0).confidence_interval(0.95)
    assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx((expected.low, expected.high))
    assert "4 clients, 3 seeds" in figure.legends[0].get_texts()[0].get_text()


def test_traffic_bars_are_bytes_up_and_down(tmp_path: Path) -> None:
    axes = plots.traffic(make_run(tmp_path / "run").rounds()).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [200] * 3 + [600] * 3
    many = make_run(tmp_path / "many", (0.5,) * 61).rounds()
    assert not plots.traffic(many).axes[0].patches


def test_partition_stacks_are_client_sizes() -> None:
    clients = [{"node": n, "examples": 3 * n, "labels": [n, 2 * n]} for n in range(4)]
    figure = plots.partition({"label_names": ["a", "b"], "clients": clients})
    tops = [bar.get_y() + bar.get_height() for bar in figure.axes[0].patches[4:]]
    assert tops == [0, 3, 6, 9]
    assert named(figure) == ["a", "b"]


def test_many_classes_share_the_last_colour_and_lose_no_text() -> None:
    counts = np.random.default_rng(0).integers(0, 9, size=(70, 20))
    clients = [{"node": n, "examples": int(c.sum()), "labels": c.tolist()} for n, c in enumerate(counts)]
    figure = plots.partition({"label_names": [f"class {i}" for i in range(20)], "clients": clients})
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == counts.sum()
    assert named(figure)[-1] == "13 others"


def test_a_partition_without_classes_shows_sizes() -> None:
    clients = [{"node": n, "examples": n, "labels": None} for n in range(3)]
    figure = plots.partition({"label_names": [], "clients": clients})
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0, 1, 2]
    assert not figure.legends


def named(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


def long_names(count: int) -> list[str]:
    return [f"series {i:02d} " + "of words, W-m@$ "[: 12 - i % 3] * 4 + "x" * 3 for i in range(count)]


def drawn_with(names: list[str]) -> dict[str, Figure]:
    """Every kind of plot, with series or classes of these names."""
    rounds = [made(number, metrics={"accuracy": number / 4}) for number in range(1, 4)]
    clients = [{"node": n, "examples": len(names), "labels": [1] * len(names)} for n in range(3)]
    return {
        "curves": plots.curves(dict.fromkeys(names, rounds), "accuracy", "bytes"),
        "repeated": plots.repeated(
            {name: [(seed, rounds) for seed in range(3)] for name in names}, "accuracy"
        ),
        "partition": plots.partition({"label_names": names, "clients": clients}),
        "traffic": plots.traffic(rounds),
    }


def made(number: int, **given: Any) -> RoundRecord:
    return RoundRecord(round=number, seconds=2.0, bytes_up=100, bytes_down=300, **given)


@pytest.mark.slow
@pytest.mark.parametrize("count", quick([1, 8, 20], 20))
def test_no_number_of_long_names_makes_a_plot_collapse(count: int) -> None:
    names = [("x" * 60 + name)[-60:] for name in long_names(count)]
    for kind, figure in drawn_with(names).items():
        figure.canvas.draw()
        width, height = figure.get_size_inches()
        inner = figure.axes[0].get_position()
        assert inner.width * width > 3, kind
        assert inner.height * height > 2, kind
        assert inner.width * inner.height > 0.2, kind
        for legend in figure.legends:
            box = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
            assert box.x0 >= 0, kind
            assert box.y0 >= inner.y1 * height * figure.dpi, kind  # above the axes, not over them
            assert box.x1 <= width * figure.dpi, kind
            assert box.y1 <= height * figure.dpi, kind
    assert count == 1 or named(drawn_with(names)["curves"]) == names


@pytest.mark.slow
def test_twenty_series_look_different() -> None:
    lines = drawn_with(long_names(20))["curves"].axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 20
    plain = drawn_with(long_names(20))["repeated"].axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in plain}) == 20


@pytest.mark.slow
def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    names = [
        "$x^{",
        "$$",
        "_hidden",
        "a\\frac",
        "two\nlines",
        "\ud800 half",
        "tab\t!",
        "\u4e2d",
        "",
        "%d",
    ]
    shown = ["$x^{", "$$", "_hidden", "a\\frac", "two lines", "? half", "tab !", "\u4e2d", " ", "%d"]
    figure = plots.curves({name: [made(1)] for name in names}, "accuracy")
    assert named(figure) == shown
    plots.save(figure, tmp_path / "curves.png")
    assert "$x^{" in (tmp_path / "curves.svg").read_text()


def test_the_starting_point_is_drawn() -> None:
    start = made(0, metrics={"accuracy": 0.2})
    x, y = plots.progress([start, made(1, metrics={"accuracy": 0.6})], "accuracy", "round")
    assert (x, y) == ([0, 1], [0.2, 0.6])


def test_bytes_that_differ_much_stand_on_a_logarithmic_axis() -> None:
    small = [made(number, metrics={"accuracy": 0.5}) for number in (1, 2)]
    large = [dataclasses.replace(record, bytes_up=10**6) for record in small]
    assert plots.curves({"a": small}, "accuracy", "bytes").axes[0].get_xscale() == "linear"
    assert plots.curves({"a": small, "b": large}, "accuracy", "bytes").axes[0].get_xscale() == "log"
    assert plots.curves({"a": small, "b": large}, "accuracy", "seconds").axes[0].get_xscale() == "linear"
    assert plots.traffic([*small, *large]).axes[0].get_yscale() == "log"


def test_bytes_on_an_axis_have_units() -> None:
    rounds = [made(number, metrics={"accuracy": 0.5}) for number in (1, 2, 3)]
    axis = plots.curves({"a": rounds}, "accuracy", "bytes").axes[0].xaxis
    assert {"750 B", "1 kB", "1.25 kB"} <= {text.get_text() for text in axis.get_ticklabels()}


@pytest.mark.slow
def test_a_plot_is_saved_for_papers_and_pages(tmp_path: Path) -> None:
    figure = plots.traffic([made(1)])
    assert plots.save(figure, tmp_path / "traffic.png") == tmp_path / "traffic.png"
    begins = {path.name: path.read_bytes()[:5] for path in tmp_path.iterdir()}
    assert begins == {"traffic.png": b"\x89PNG\r", "traffic.pdf": b"%PDF-", "traffic.svg": b"<?xml"}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    plots.save(plots.traffic([made(1)]), tmp_path / "traffic.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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


@pytest.mark.slow
def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = (
        "import sys, simulations.results.report, simulations.results.compare;"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
