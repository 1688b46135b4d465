"""What people watch while a run goes on."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fedllm.config import RunConfig
from fedllm.live import Watcher
from fedllm.store import Entry, Round, RunStore


def test_each_round_is_one_line_off_a_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    watcher = Watcher(Console(file=io.StringIO(), width=200))
    watcher.update(folder)  # not there yet
    with RunStore.create(folder, RunConfig(name="run", rounds=2), {"engine": "loopback"}) as store:
        start = {"initial": {"perplexity": 60.0, "loss": 4.0}}
        store.round(
            Round(round=0, seconds=1.0, details=start), [], [Entry(0, 0, "up", "describe", "metrics", 100)]
        )
        watcher.update(folder)  # finds the run
        watcher.update(folder)  # shows what is in it
        told = {"error_up": 0.25, "error_down": 0.012}
        record = Round(
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
    up = "up 1 kB (8.0x fewer)  down 0 B  error 0.25 / 0.012"
    assert second == f"round 1  perplexity 40  loss 3.5  {up}  clients 3 (1 lost)  2.0 s"
