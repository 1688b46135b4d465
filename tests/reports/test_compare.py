"""Comparisons: intervals against scipy's own tests, ratios against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from fedllm.config import CodecConfig
from fedllm.errors import StoreError
from simulations.results.compare import compare, draw, expand, settings, table
from simulations.results.intervals import Interval, interval, paired
from tests.reports.made_up import make_run

ACCURACIES = st.lists(st.floats(0, 1).map(lambda x: round(x, 6)), min_size=2, max_size=8)


@given(ACCURACIES)
def test_the_interval_is_that_of_scipys_t_test(values: list[float]) -> None:
    found = interval(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low is not None
    assert found.high is not None
    if np.std(values) < 1e-9:
        assert found.high - found.low == pytest.approx(0, abs=1e-9)
    else:
        expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_paired_difference_is_that_of_scipys_related_t_test() -> None:
    reference = {0: 0.90, 1: 0.94, 2: 0.91, 7: 0.1}
    other = {2: 0.93, 0: 0.91, 1: 0.945, 8: 0.9}
    found = paired(reference, other)
    test = stats.ttest_rel([0.91, 0.945, 0.93], [0.90, 0.94, 0.91])
    expected = test.confidence_interval(0.95)
    assert found is not None
    assert found.n == 3
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_no_interval() -> None:
    assert interval([0.25]) == Interval(0.25, None, None, 1)


def test_ratios_and_differences_are_against_the_first(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", up=400)
    small = make_run(tmp_path / "small", (0.5, 0.6, 0.88), up=100, codec=CodecConfig(up="quantize(bits=8)"))
    found = compare([plain.folder, small.folder])
    assert found == json.loads(json.dumps(found))
    assert found["reference"] == "plain"
    first, second = found["settings"]
    assert (first["bytes_up"], second["bytes_up"], second["bytes_down"]) == (2400, 600, 1800)
    assert (first["bytes_up_ratio"], second["bytes_up_ratio"]) == (1.0, 4.0)
    assert second["bytes_ratio"] == (2400 + 1800) / (600 + 1800)
    assert first["difference"]["accuracy"] is None
    assert second["difference"]["accuracy"]["mean"] == pytest.approx(-0.02)
    assert second["difference"]["perplexity"] is None


@pytest.mark.slow
def test_a_narrow_table_shows_the_metric_that_decides_and_machines_get_all(tmp_path: Path) -> None:
    runs = {
        decides: [
            make_run(
                tmp_path / f"{decides}-{clients}", (0.5, clients / 10), metric="macro_f1",
                also={"accuracy": 0.25}, clients=clients, evaluation={"metric": decides},
            ).folder
            for clients in (3, 4)
        ]
        for decides in ("accuracy", "macro_f1")
    }  # fmt: skip
    for decides, folders in runs.items():
        found = compare(folders)
        assert [row["macro_f1"]["mean"] for row in found["settings"]] == [0.3, 0.4]
        assert [row["accuracy"]["mean"] for row in found["settings"]] == [0.25, 0.25]
        assert found["metrics"][0] == decides
        (left_out,) = runs.keys() - {decides}
        printed = _printed(folders)
        # The first column of the change is of the one that decides.
        assert decides in printed
        assert left_out not in printed
        assert "loss" in printed
    assert draw(runs["macro_f1"], tmp_path / "out")[0].name == "macro_f1-round.png"


def test_runs_that_differ_in_seed_and_name_only_are_repeats(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"plain-seed{seed}", (0.1, 0.9 + seed / 100), seed=seed) for seed in range(3)]
    runs += [make_run(tmp_path / "other", (0.1, 0.95), clients=4)]
    groups = settings(runs)
    assert {name: [run.config.seed for run in group] for name, group in groups.items()} == {
        "plain-seed": [0, 1, 2],
        "other": [0],
    }
    row = compare([run.folder for run in runs])["settings"][0]
    assert row["accuracy"]["n"] == 3
    assert row["accuracy"]["mean"] == pytest.approx(0.91)


def test_the_same_seed_twice_is_not_two_seeds(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, seed=4).folder for name in ("a", "b")]
    rows = compare(folders)["settings"]
    assert [(row["name"], row["accuracy"]["n"]) for row in rows] == [("a", 1), ("b", 1)]
    assert rows[1]["difference"]["accuracy"]["mean"] == 0.0


def test_one_name_for_two_settings_keeps_both(tmp_path: Path) -> None:
    for parent, clients in (("x", 3), ("y", 4)):
        (tmp_path / parent).mkdir()
        make_run(tmp_path / parent / "run", clients=clients)
    names = [row["name"] for row in compare([tmp_path / "x" / "run", tmp_path / "y" / "run"])["settings"]]
    assert names == ["run", f"run ({tmp_path / 'y' / 'run'})"]


def test_a_folder_of_runs_stands_for_its_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "all" / name).folder for name in ("a", "b")]
    assert expand([tmp_path / "all"]) == runs
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"empty holds no run: run.db is missing"):
        expand([tmp_path / "empty"])
    with pytest.raises(StoreError, match="is not a folder of runs"):
        expand([tmp_path / "missing"])


def _printed(folders: list[Path]) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(compare(folders)))
    console.file.close()
    return console.export_text()


def test_the_table_says_what_people_ask(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", up=400)
    small = make_run(tmp_path / "small", (0.5, 0.88), up=100, status="failed", server={"momentum": 0.5})
    text = _printed([plain.folder, small.folder])
    for piece in ("small (failed)", "0.9000", "-0.0200", "2.4 kB", "400 B", "6x", "against plain"):
        assert piece in text, piece
    assert "perplexity" not in text
    assert "interval" not in text


def test_the_table_shows_intervals_of_repeats(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"s{s}", (0.9 + s / 100,), seed=s).folder for s in range(3)]
    text = _printed(folders)
    expected = stats.ttest_1samp([0.90, 0.91, 0.92], 0.0).confidence_interval(0.95)
    assert f"±{(expected.high - expected.low) / 2:.4f}" in text
    assert "95 % interval" in text


def test_an_interval_of_two_seeds_says_nothing_and_is_not_shown(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"s{s}", (0.7 + s / 10,), seed=s).folder for s in range(2)]
    (row,) = compare(folders)["settings"]
    # Half of it is t(0.975, 1) = 12.706 times 0.0707 / sqrt(2): beyond what an accuracy can be, and not cut.
    assert row["accuracy"]["high"] == pytest.approx(0.75 + 12.7062 * 0.05, abs=1e-4)
    assert (row["accuracy"]["n"], row["accuracy"]["means_something"]) == (2, False)
    text = _printed(folders)
    assert "±" not in text
    assert "n = 2" in text


def test_clients_that_train_for_themselves_are_not_seeds(tmp_path: Path) -> None:
    folders = [
        make_run(
            tmp_path / f"s{seed}c{client}",
            (0.5 + client / 10 + seed / 100,),
            seed=seed,
            clients=1,
            data={"part": (client, 4)},
        ).folder
        for seed in range(3)
        for client in range(4)
    ]
    (row,) = compare(folders[:4])["settings"]
    assert row["accuracy"] == {
        "mean": pytest.approx(0.65), "low": None, "high": None, "n": 1, "means_something": False,
    }  # fmt: skip
    text = _printed(folders[:4])
    assert "4 clients, 1 seed" in text
    assert "4 seeds" not in text
    expected = stats.ttest_1samp([0.65, 0.66, 0.67], 0.0).confidence_interval(0.95)
    text = _printed(folders)
    assert "4 clients, 3 seeds" in text
    assert f"±{(expected.high - expected.low) / 2:.4f}" in text


def test_all_texts_in_one_place_are_no_client_that_trains_for_itself(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"{part}", (0.5,), clients=1, data={"part": part}).folder
        for part in [(0, 2), (1, 2), (0, 1)]
    ]
    assert len(compare(folders)["settings"]) == 2


@pytest.mark.slow
def test_overlaid_plots(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a").folder, make_run(tmp_path / "b", clients=5).folder]
    drawn = draw(folders, tmp_path / "out")
    assert [path.name for path in drawn] == [
        "accuracy-round.png",
        "accuracy-bytes.png",
        "accuracy-seconds.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    causal = make_run(tmp_path / "c", metric="perplexity", clients=6).folder
    assert draw([*folders, causal], tmp_path / "out")[0].name == "loss-round.png"
    seeds = [make_run(tmp_path / f"s{s}", seed=s, clients=7).folder for s in range(2)]
    assert len(draw([*folders, *seeds], tmp_path / "seeds")) == 3
