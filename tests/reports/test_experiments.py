"""Experiments as data: what a file may say, which runs it makes, and what comes of them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from scipy import stats

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, StoreError
from fedllm.runs.lock import holder
from fedllm.runs.reader import Run
from fedllm.runs.records import FILE, RoundRecord
from fedllm.runs.writer import RunStore
from simulations import running
from simulations.experiments import figures
from simulations.experiments.cells import CellRun, forecast, lay_out, selected, unfinished
from simulations.experiments.definition import Experiment, names, read
from simulations.experiments.findings import findings, shown
from simulations.experiments.report import write
from tests.commands.conftest import fedllm as fedllm
from tests.parts import quick
from tests.processes import until
from tests.reports.made_up import make_run

BASE = {"preset": "quickstart", "memory_gb": 0.5, "disk_mb": 1.0, "set": {"clients": 3, "rounds": 2}}
CELLS = {
    "plain": {"title": "plain", "minutes": 1.0},
    "coded": {"title": "in <b>8</b> bits", "minutes": 1.0, "set": {"codec": {"up": "quantize(bits=8)"}}},
    "alone": {"title": "each for itself", "minutes": 3.0, "baseline": "local", "seeds": [0]},
}
PAIR = {"of": "coded", "against": "plain"}


def experiment(**settings: Any) -> Experiment:
    """The experiment of these cells, with other settings."""
    told = {"title": "A <trial>", "paper": "Somebody, 2020", "here": "Made up.", "seeds": [0, 1, 2]}
    document = told | {"base": BASE, "cells": CELLS, "quick": {"set": {"rounds": 1}, "seeds": [0]}}
    return Experiment.model_validate(document | settings).require_cells()


def made(runs: Sequence[CellRun], accuracies: dict[str, Sequence[float]], up: dict[str, int]) -> None:
    """Write finished runs with these accuracies, by cell and seed, where the runs belong."""
    for run in runs:
        if run.cell in accuracies:
            value = accuracies[run.cell][run.config.seed]
            make_run(run.folder, (0.5, value), seed=run.config.seed, up=up[run.cell])


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("title = ", r"tiny.toml is not valid TOML: "),
        ("[cells.a]\nminuts = 1", r"tiny.toml: unknown key cells.a.minuts; did you mean minutes\?"),
        ("[cells.a]\nminutes = 1", r"tiny.toml: cells.a.title is missing"),
        (
            "[cells.a]\ntitle = 'a'",
            r"tiny.toml: cells.a lacks minutes, and there is no hardware to reckon it for",
        ),
        ("spectra = ['plan']", r"tiny.toml: spectra.0 = 'plan' is no cell; did you mean plain\?"),
        (
            "[cells.a]\ntitle = 'a'\nminutes = 0",
            r"tiny.toml: cells.a.minutes = 0 is not allowed: .*greater than 0",
        ),
        ("[cells.'a b']\ntitle = 'a'\nminutes = 1", r"tiny.toml: cells: 'a b' is not a run name"),
        ("seeds = [1, 1]", r"tiny.toml: seeds = \[1, 1\] must hold numbers from 0 on, each once"),
        ("[quick]\nseeds = []", r"tiny.toml: quick.seeds = \[\] must hold numbers"),
        (
            "[[differences]]\nof = 'coded'\nagainst = 'plane'",
            r"differences.0.against = 'plane' is no cell; did",
        ),
        (
            "[[claims]]\npaper = 'x'\nof = 'coded'\nagainst = 'plain'",
            r"claims.0 takes either at_least or not",
        ),
        (
            "[[differences]]\nof = 'coded'\nagainst = 'plain'\nmeasure = 'bytes.up'\nkind = 'share_of_gain'",
            r"tiny.toml: differences.0.measure = 'bytes.up' has no start: ",
        ),
        ("[base]\npreset = 1", r"tiny.toml: base.preset = 1 is not allowed: input should be a valid string"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_name_and_the_key(
    text: str, sentence: str, tmp_path: Path
) -> None:
    import tomli_w

    file = tmp_path / "tiny.toml"
    whole = experiment().model_dump(mode="json", exclude_none=True)
    file.write_text(tomli_w.dumps(whole))
    assert read(str(file)) == experiment()
    given = text if text == "title = " else tomli_w.dumps(_merged(whole, text))
    file.write_text(given)
    with pytest.raises(ConfigError, match=sentence) as refused:
        read(str(file))
    assert str(file) in str(refused.value)


def _merged(whole: dict[str, Any], text: str) -> dict[str, Any]:
    import tomllib

    changed = dict(whole)
    for key, value in tomllib.loads(text).items():
        changed[key] = {**whole[key], **value} if isinstance(value, dict) else value
    return changed


def test_a_cell_that_varies_a_key_is_a_cell_for_each_value_too() -> None:
    coded = CELLS["coded"] | {"vary": {"codec.down": ["none", "quantize(bits=4)"], "training.lr": []}}
    with pytest.raises(ValueError, match="at most 1 item"):
        experiment(cells=CELLS | {"coded": coded})
    coded["vary"] = {"training.batch_size": [4, 2]}
    found = experiment(cells=CELLS | {"coded": coded}).cells
    assert [*found] == ["plain", "coded", "coded-4", "coded-2", "alone"]
    assert found["coded-2"].title == "in <b>8</b> bits, batch size 2"
    assert found["coded-2"].set == {"codec": {"up": "quantize(bits=8)"}, "training": {"batch_size": 2}}
    assert found["coded"].set == CELLS["coded"]["set"]
    with pytest.raises(ValueError, match="two cells are called coded-4"):
        experiment(cells=CELLS | {"coded": coded, "coded-4": CELLS["plain"]})
    with pytest.raises(ValueError, match=r"coded.vary has 'codec.up.x', and up is no section"):
        experiment(cells=CELLS | {"coded": coded | {"vary": {"codec.up.x": [1]}}})


def test_what_is_no_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no experiment 'lorra'; did you mean lora\?, or a TOML"):
        read("lorra")
    with pytest.raises(ConfigError, match="cannot read configuration"):
        read(str(tmp_path / "none.toml"))


def test_a_cell_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    wrong = CELLS | {"odd": {"title": "odd", "minutes": 1.0, "set": {"data": {"alfa": 1.0}}}}
    with pytest.raises(ConfigError, match=r"cells.odd: unknown key data.alfa; did you mean alpha\?"):
        lay_out(experiment(cells=wrong), tmp_path)
    twice = CELLS | {"again": {"title": "again", "minutes": 1.0}}
    with pytest.raises(ConfigError, match="plain-seed0 and again-seed0 are the same run"):
        lay_out(experiment(cells=twice), tmp_path)
    whatever = CELLS | {"host": {"title": "h", "minutes": 1.0, "set": {"model": {"dtype": "auto"}}}}
    with pytest.raises(ConfigError, match=r'cells.host: model.dtype = "auto" follows the host'):
        lay_out(experiment(cells=whatever), tmp_path)
    with pytest.raises(ConfigError, match="both say the seed"):
        lay_out(experiment(), tmp_path, extra=["seed=3"])


@pytest.mark.parametrize("name", quick(names(), "fedkd"))
def test_every_experiment_can_be_laid_out_and_fits_an_hour_of_two_cores(name: str, tmp_path: Path) -> None:
    asked = read(name)
    runs = lay_out(asked, tmp_path)
    assert {run.cell for run in runs} == set(asked.cells)
    assert forecast(runs, jobs=2).cost.seconds / 2 < 3600
    assert asked.quick is not None
    assert forecast(lay_out(asked, tmp_path, variant=asked.quick), jobs=2).cost.seconds / 2 < 600


def test_fedkd_is_judged_on_seeds_that_chose_nothing() -> None:
    assert read("fedkd").seeds == (20, 21, 22)


# --- runs ---------------------------------------------------------------------------------------------


def test_an_interrupted_experiment_leaves_whole_pairs(tmp_path: Path) -> None:
    labels = [run.label for run in lay_out(experiment(), tmp_path)]
    assert labels == [
        *("plain-seed0", "coded-seed0", "alone-seed0-client0", "alone-seed0-client1", "alone-seed0-client2"),
        *("plain-seed1", "coded-seed1", "plain-seed2", "coded-seed2"),
    ]


def test_seeds_and_variants_replace_what_cells_say(tmp_path: Path) -> None:
    runs = lay_out(experiment(), tmp_path, seeds=[7], extra=["data.alpha=0.25"])
    assert {run.config.seed for run in runs} == {7}
    assert {run.config.data.alpha for run in runs} == {0.25}
    quick = lay_out(experiment(), tmp_path, variant=experiment().quick)
    assert [(run.config.seed, run.config.rounds) for run in quick] == 5 * [(0, 1)]
    # A start of five seconds, and half the work of the whole.
    assert quick[0].cost.seconds == pytest.approx(5 + 60 / 2)
    assert quick[2].cost.seconds == pytest.approx(5 + 180 / 2 / 3)
    assert forecast(quick, jobs=2).cost.memory == 2 * 0.5e9


def test_runs_are_kept_by_their_configuration(tmp_path: Path) -> None:
    first, *rest = lay_out(experiment(), tmp_path)
    with RunStore.create(first.folder, first.config) as store:
        store.finish("finished")
    assert unfinished([first, *rest]) == rest
    again, *_ = lay_out(experiment(), tmp_path, extra=["data.alpha=0.25"])
    assert again.label == first.label
    assert again.folder != first.folder
    assert again.status == "not begun"
    told = first.folder / "config.toml"
    told.write_text(told.read_text().replace("learning_rate = ", "learning_rate = 1"))
    with pytest.raises(StoreError, match=r"config.toml says training.learning_rate = 1\S+, but the run was"):
        unfinished([first, *rest])


def test_patterns_choose_cells_and_runs(tmp_path: Path) -> None:
    runs = lay_out(experiment(), tmp_path)
    assert [run.label for run in selected(runs, ["plain", "*client1"])] == [
        *("plain-seed0", "alone-seed0-client1", "plain-seed1", "plain-seed2")
    ]
    assert selected(runs, []) == runs
    with pytest.raises(ConfigError, match=r"--only plane names no cell; did you mean plain\?"):
        selected(runs, ["plain", "plane"])


# --- findings -----------------------------------------------------------------------------------------

ACCURACIES = {"plain": (0.90, 0.94, 0.92), "coded": (0.91, 0.90, 0.93), "alone": (0.5, 0.0, 0.0)}
CLAIMS = [
    {**PAIR, "paper": "no worse", "at_least": -0.01},
    {**PAIR, "paper": "better", "at_least": 0.0},
    {
        **{**PAIR, "measure": "bytes.up", "kind": "times_fewer"},
        **{"paper": "4x", "at_least": 4.5},
    },
    {**PAIR, "paper": "a clock", "not_comparable": "it is another clock"},
    {"of": "alone", "against": "plain", "measure": "bytes.up", "paper": "none", "at_least": 0.0},
]


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Experiment, list[CellRun]]:
    asked = experiment(claims=CLAIMS, differences=[{**PAIR, "shows": "what a | codec costs"}])
    runs = lay_out(asked, tmp_path)
    made(runs, ACCURACIES, {"plain": 800, "coded": 200, "alone": 50})
    return asked, runs


def test_cells_have_mean_and_deviation_and_differences_are_paired(
    finished: tuple[Experiment, list[CellRun]],
) -> None:
    found = findings(*finished, {})
    plain, coded, alone = found["cells"]
    assert plain["measured"]["metrics.accuracy"]["mean"] == pytest.approx(0.92)
    assert plain["measured"]["metrics.accuracy"]["deviation"] == pytest.approx(0.02)
    assert coded["measured"]["bytes.up"]["mean"] == 4 * 200
    assert alone["measured"]["metrics.accuracy"]["by_seed"] == {0: 0.5}
    assert alone["measured"]["bytes.up"] is None
    expected = stats.ttest_rel(ACCURACIES["coded"], ACCURACIES["plain"]).confidence_interval(0.95)
    (difference,) = found["differences"]
    assert difference["found"]["mean"] == pytest.approx(-0.02 / 3)
    assert (difference["found"]["low"], difference["found"]["high"]) == pytest.approx(tuple(expected))


def test_what_rounding_makes_of_a_difference_of_nothing_is_no_miss(tmp_path: Path) -> None:
    """Of 890 texts 855, 851 and 846 against 853, 852 and 847: sums are equal, and floats' are not."""
    plain, coded = (855 / 890, 851 / 890, 846 / 890), (853 / 890, 852 / 890, 847 / 890)
    asked = experiment(claims=[{**PAIR, "paper": "no less", "at_least": 0.0}])
    runs = lay_out(asked, tmp_path)
    made(runs, {"plain": plain, "coded": coded}, {"plain": 1, "coded": 1})
    (claim,) = findings(asked, runs, {})["claims"]
    assert -1e-15 < claim["found"]["mean"] < 0
    assert claim["verdict"] == "met"
    assert shown(claim).startswith("+0.0000 [")


def test_claims_are_met_or_missed_by_so_much_or_not_judged(
    finished: tuple[Experiment, list[CellRun]],
) -> None:
    assert [one["verdict"] for one in findings(*finished, {})["claims"]] == [
        "met",
        "missed by 0.0067",
        "missed by 0.5x",
        "not comparable: it is another clock",
        "not judged: alone and plain have no seed in common that is finished",
    ]
    quick = findings(*finished, {}, "it was quick")
    assert {one["verdict"] for one in quick["claims"]} == {"not judged: it was quick"}


def test_a_share_is_of_what_was_gained_since_the_start(tmp_path: Path) -> None:
    share = {**PAIR, "kind": "share_of_gain", "paper": "half", "at_least": 0.5}
    asked = experiment(claims=[share, {**share, "at_least": 0.7125}], seeds=[0, 1])
    runs = lay_out(asked, tmp_path)
    ends = {"plain": (0.9, 0.8), "coded": (0.7, 0.65)}
    for run in runs:
        if run.cell in ends:
            seed = run.config.seed
            make_run(run.folder, (0.4, 0.1, ends[run.cell][seed]), seed=seed, first=0)
    half, more = findings(asked, runs, {})["claims"]
    assert half["found"]["mean"] == pytest.approx(
        ((0.7 - 0.4) / (0.9 - 0.4) + (0.65 - 0.4) / (0.8 - 0.4)) / 2
    )
    assert (half["verdict"], more["verdict"]) == ("met", "missed by 0.100")
    assert shown(half).startswith("+0.61")


def test_a_measure_that_no_summary_has_is_refused(finished: tuple[Experiment, list[CellRun]]) -> None:
    wrong = experiment(differences=[{**PAIR, "measure": "speed"}])
    with pytest.raises(ConfigError, match=r"measure = 'speed' is no section of summary.json and a key in it"):
        findings(wrong, finished[1], {})


@pytest.mark.slow
def test_the_report_says_where_every_number_comes_from(
    finished: tuple[Experiment, list[CellRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, runs = finished
    found = findings(asked, runs, {"coded-seed2": "the <disk> is full"})
    one = {"differences": figures.figures(found)["differences"]}
    monkeypatch.setattr(figures, "figures", lambda _: one)  # drawing takes most of the time
    write(asked, found, runs, tmp_path, lambda label: f"make {label}")
    page, text = ((tmp_path / f"report.{form}").read_text() for form in ("html", "md"))
    assert "in &lt;b&gt;8&lt;/b&gt; bits" in page
    assert "<b>8" not in page
    assert "the &lt;disk&gt; is full" in page
    assert "| in <b>8</b> bits | coded | 3 | 0.9133 ± 0.0153 |" in text
    assert "| what a \\| codec costs |" in text
    assert "-0.0067 [" in text
    assert "missed by 0.0067" in text
    rows = list(csv.DictReader((tmp_path / "cells.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == [run.label for run in runs]
    for row, run in zip(rows, runs, strict=True):
        assert (row["command"], row["folder"]) == (f"make {run.label}", str(run.folder))
        assert float(row["metrics.accuracy"]) == Run(run.folder).summary["metrics"]["accuracy"]
        assert (row["bytes.up"] == "") == (run.cell == "alone")  # to itself, over no network
    assert {row["reason"] for row in rows} == {"", "the <disk> is full"}
    made_by = json.loads((tmp_path / "environment.json").read_text())
    assert {"versions", "git", "machine", "made_by"} <= made_by.keys()
    assert "(figures/differences.png)" in text
    assert all((tmp_path / "figures" / f"differences.{form}").stat().st_size for form in ("png", "svg"))


def test_error_bars_are_the_intervals_and_every_row_is_named(
    finished: tuple[Experiment, list[CellRun]],
) -> None:
    found = findings(*finished, {})
    drawn = figures.figures(found)
    axes = drawn["accuracy"][1].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "plain",
        "in <b>8</b> bits",
        "each for itself",
    ]
    assert axes.get_xlabel() == "test accuracy"
    (bar,) = (one for one in axes.containers[0].lines[2])
    low, high = sorted(bar.get_segments()[0][:, 0])
    told = found["cells"][0]["measured"]["metrics.accuracy"]
    assert (low, high) == pytest.approx((told["low"], told["high"]))
    # A single seed has no bar.
    assert not axes.containers[2].has_xerr
    shown = drawn["accuracy-bytes"][1].axes[0]
    assert {text.get_text() for text in shown.texts} == {"plain", "in <b>8</b> bits"}
    assert shown.get_xlabel() == "sent in all, both directions (bytes)"


def test_the_front_is_what_nobody_betters() -> None:
    rng = np.random.default_rng(0)
    costs, losses = rng.integers(1, 6, 20).tolist(), rng.integers(1, 6, 20).tolist()
    found = figures.front(costs, losses, higher=False)
    points = list(zip(costs, losses, strict=True))
    best = {
        (c, s)
        for c, s in points
        if not any((other <= c and score <= s and (other, score) != (c, s)) for other, score in points)
    }
    assert [points[k] for k in found] == sorted(best)


def test_courses_are_means_over_seeds_of_cells_with_enough_scores(tmp_path: Path) -> None:
    def rounds(name: str, seed: int, *accuracies: float) -> tuple[int, Sequence[RoundRecord]]:
        return seed, make_run(tmp_path / f"{name}{seed}", accuracies, seed=seed).rounds()

    long = [rounds("long", 0, 0.1, 0.2, 0.3, 0.6), rounds("long", 1, 0.3, 0.4, 0.5, 0.8)]
    drawn = figures.courses({"long": long, "short": [rounds("short", 0, 0.1, 0.2, 0.3)]}, "accuracy")
    assert list(drawn) == ["accuracy-by-round", "accuracy-by-passes", "accuracy-by-bytes"]
    (line,) = drawn["accuracy-by-round"][1].axes[0].get_lines()
    assert list(line.get_xdata()) == [1, 2, 3, 4]
    assert list(line.get_ydata()) == pytest.approx([0.2, 0.3, 0.4, 0.7])
    (line,) = drawn["accuracy-by-bytes"][1].axes[0].get_lines()
    assert list(line.get_xdata()) == [800, 1600, 2400, 3200]
    assert not figures.courses({"short": [rounds("brief", 0, 0.1)]}, "accuracy")


def test_names_beside_dots_do_not_cover_one_another() -> None:
    def told(value: float) -> dict[str, Any]:
        return {"mean": value, "low": None, "high": None, "means_something": False}

    cells = [
        {"title": f"a setting, number {n}", "baseline": None}
        | {"measured": {"metrics.accuracy": told(0.9 + n / 1e4), "bytes.total": told(1e6 + n)}}
        for n in range(8)
    ]
    figure = figures.tradeoff(cells, "metrics.accuracy")
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == 8
    x, y = figure.axes[0].transData.transform((1e6, 0.9))
    assert abs(boxes[0].x0 - x) < 15  # beside its dot
    assert boxes[0].y0 < y < boxes[0].y1
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


# --- the command --------------------------------------------------------------------------------------


def test_the_list_says_what_runs_cost_and_starts_none(
    fedllm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = fedllm("reproduce", "lora", "--list", "--only", "lora-30x", "--json")
    rows = json.loads(answer.out)
    assert [row["label"] for row in rows] == [f"lora-30x-seed{seed}" for seed in (20, 21, 22)]
    assert {row["status"] for row in rows} == {"not begun"}
    assert all(row["seconds"] > 60 for row in rows)
    told = fedllm("reproduce", "lora", "--list", "--only", "lora-30x")
    assert "FedIT, 1 bit up" in told.out
    assert told.err.startswith("3 runs, about ")
    assert not list(tmp_path.iterdir())


def test_without_a_name_the_experiments_are_listed(fedllm: Callable[..., Any]) -> None:
    rows = json.loads(fedllm("reproduce", "--json").out)
    assert [row["name"] for row in rows] == names()
    one = rows[names().index("lora")]
    listed = json.loads(fedllm("reproduce", "lora", "--list", "--json").out)
    assert (one["runs"], one["seconds"]) == (len(listed), sum(row["seconds"] for row in listed))
    told = fedllm("reproduce", "--list")
    assert all(name in told.out for name in names())
    refused = fedllm("reproduce", "--quick")
    assert (refused.code, "which experiment?" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--scale", "gpu"], "--scale is cpu or paper, not 'gpu'"),
        (["--scale", "paper", "--quick"], "this experiment has no [quick]: leave --quick out"),
        (["--set", "seed=1"], "both say the seed"),
    ],
)
def test_what_cannot_be_meant_is_refused(fedllm: Callable[..., Any], words: list[str], sentence: str) -> None:
    answer = fedllm("reproduce", "lora", *words)
    assert answer.code == 2
    assert sentence in answer.err


# --- the whole machine --------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> Path:
    """A file of an experiment on a tiny model; one of its cells cannot run."""
    import tomli_w

    settings = {
        **{"clients": 2, "rounds": 30, "model": {"name": str(tiny_encoder)}},
        **{"data": {"path": str(tiny_texts), "max_length": 8}, "evaluation": {"every": 30}},
        "training": {"local_steps": 1, "batch_size": 2},
    }
    broken = {"title": "no model", "minutes": 0.1, "set": {"model": {"name": "/nowhere"}}}
    asked = experiment(
        base=BASE | {"set": settings},
        cells={name: CELLS[name] for name in ("plain", "coded")} | {"broken": broken},
        claims=CLAIMS[:1],
        seeds=[0],
        quick={"set": {"rounds": 2, "evaluation": {"every": 2}}},
    )
    file = tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(asked.model_dump(mode="json", exclude_none=True)))
    return file


def started(folder: Path, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from fedllm.cli import main; main()", "reproduce", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_a_cell_that_fails_says_why_and_the_others_go_on(tiny: Path, tmp_path: Path) -> None:
    with started(tmp_path, tiny, "--quick", "--jobs", 2) as process:
        out, err = process.communicate()
    assert process.returncode == 1, err
    assert "error: 1 of 3 runs failed, broken-seed0 first: model.name = '/nowhere'" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert "not judged: the quick variant has fewer rounds" in out
    told = tmp_path / "runs" / "reproduce-tiny-quick" / "cells.csv"
    rows = list(csv.DictReader(told.read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished", "finished", "not begun"]
    assert rows[2]["reason"].startswith("model.name = '/nowhere'")
    assert rows[0]["command"] == f"fedllm reproduce {tiny} --only plain-seed0 --quick"
    with started(tmp_path, tiny, "--quick", "--only", "plain") as process:
        _, err = process.communicate()
    assert process.returncode == 0
    assert err.startswith("1 of 1 runs are finished already\n")


@pytest.mark.slow
def test_after_a_kill_or_ctrl_c_the_same_command_goes_on(tiny: Path, tmp_path: Path) -> None:
    words = [tiny, "--only", "plain", "--only", "coded", "--jobs", 2, "--out", "out"]
    runs = selected(lay_out(read(str(tiny)), tmp_path / "out"), ["plain", "coded"])
    folders = [run.folder for run in runs]

    def at(rounds: int) -> bool:
        return all((folder / FILE).is_file() and len(Run(folder).rounds()) > rounds for folder in folders)

    with started(tmp_path, *words) as process:
        until(lambda: at(2))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    until(lambda: all(holder(folder) is None for folder in folders))
    assert all(len(Run(folder).rounds()) < 31 for folder in folders)
    done = max(len(Run(folder).rounds()) for folder in folders)
    with started(tmp_path, *words) as process:
        until(lambda: at(done))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted; the same command goes on where it was"
    assert "Traceback" not in err
    assert [Run(folder).status for folder in folders] == ["stopped", "stopped"]
    with started(tmp_path, *words) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    for run in runs:
        config: RunConfig = run.config
        running.run(config, tmp_path / "whole" / run.label, running.Host(threads=1), None)
        whole, resumed = Run(tmp_path / "whole" / run.label), Run(run.folder)
        assert resumed.summary["state_sha256"] == whole.summary["state_sha256"]
