"""What people watch while a run goes on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedllm.config import CodecConfig, RunConfig
from fedllm.runs.ledger import Entry
from fedllm.runs.records import RoundRecord
from fedllm.runs.writer import RunStore
from fedllm.terminal.live import Watcher
from server.dashboard.pages.charts import metric_names
from tests.reports.made_up import make_run


def test_each_round_is_one_line_off_a_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    watcher = Watcher(Console(file=io.StringIO(), width=200))
    watcher.update(folder)  # not there yet
    with RunStore.create(
        folder, RunConfig(name="run", rounds=2, codec=CodecConfig(up="sign")), {"engine": "loopback"}
    ) as store:
        start = {"perplexity": 60.0, "loss": 4.0}
        store.round(
            RoundRecord(round=0, seconds=1.0, metrics=start),
            [],
            [Entry(0, 0, "up", "describe", "metrics", 100)],
        )
        watcher.update(folder)  # finds the run
        watcher.update(folder)  # shows what is in it
        told = {"error_up": 0.25, "error_down": 0.012}
        record = RoundRecord(
            round=1,
            metrics={"perplexity": 40.0, "loss": 3.5},
            seconds=2.0,
            participants=3,
            failures=1,
            details=told,
        )
        store.round(record, [], [Entry(1, 0, "up", "fit", "payload", 1000, 8000)])
        watcher.update(folder)
        watcher.update(folder)  # nothing new, nothing said twice
    assert isinstance(watcher.console.file, io.StringIO)
    first, second = watcher.console.file.getvalue().splitlines()
    assert first == "round 0  perplexity 60  loss 4  up 100 B  down 0 B  clients 0  1.0 s"
    up = "up 1 kB (8x fewer by the codec)  down 0 B  codec error 0.25 / 0.012"
    assert second == f"round 1  perplexity 40  loss 3.5  {up}  clients 3 (1 lost)  2.0 s"


def shown(folder: Path, label: str = "") -> list[str]:
    """The lines of a finished run, off a terminal of 80 columns."""
    watcher = Watcher(Console(file=io.StringIO(), width=80, soft_wrap=True), label=label)
    for _ in range(2):
        watcher.update(folder)
    assert isinstance(watcher.console.file, io.StringIO)
    return watcher.console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("decides", "begins"),
    [
        (None, "round 1  accuracy 0.25  loss 0.75  up"),
        ("macro_f1", "round 1  macro_f1 0.5  loss 0.75  up"),
        ("loss", "round 1  loss 0.75  up"),
    ],
)
def test_the_metric_that_decides_is_shown_first(tmp_path: Path, decides: str | None, begins: str) -> None:
    run = make_run(
        tmp_path / "run", (0.5,), metric="macro_f1", also={"accuracy": 0.25}, evaluation={"metric": decides}
    )
    assert shown(run.folder)[0].startswith(begins)
    assert metric_names(run.rounds(), run.config.metric)[0] == (decides or "accuracy")


def test_runs_of_a_sweep_say_which_they_are_one_line_a_round(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    lines = shown(tmp_path / "run", "training.learning_rate=0.001-and-some-more-that-makes-it-long-seed0")
    assert len(lines) == 3
    assert all(line.startswith("training.learning_rate=0.001-and-some") for line in lines)


@pytest.mark.parametrize(
    ("up", "codec", "says"),
    [
        (100, "none", "(4x fewer than dense)"),  # scalars instead of tensors
        (100, "quantize(bits=8)", "(4x fewer by the codec)"),
        (399, "none", ""),  # headers: nothing was saved
        (399, "quantize(bits=8)", ""),
    ],
)
def test_what_is_saved_is_said_with_what_saves_it(tmp_path: Path, up: int, codec: str, says: str) -> None:
    make_run(tmp_path / "run", up=up, codec={"up": codec})
    line = shown(tmp_path / "run")[0]
    assert says in line
    assert ("fewer" in line) == bool(says)


def test_a_terminal_shows_the_columns_that_hold_something(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    made = io.StringIO()
    with Watcher(Console(file=made, width=120, force_terminal=True)) as watcher:
        for _ in range(2):
            watcher.update(tmp_path / "run")
    last = made.getvalue().rpartition("round")[2]
    assert "saved up" in last
    assert "codec error" not in last
