"""What people watch while a run goes on: a table of rounds and a line that says what happens now."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedllm.errors import StoreError
from fedllm.run_database import FILE
from fedllm.runs import Round, Run
from fedllm.trackers import Tracker
from fedllm.wording import human_bytes, number

__all__ = ["Watcher", "watching"]

_ROWS = 20
_ERRORS = ("error_up", "error_down")
"""Of what the codecs decode, against what was encoded: relative, shown as up / down."""
_INTERVAL_S = 0.25


class Watcher:
    """Reads a run folder and shows what is new in it; the run itself is never asked.

    On a terminal the table is redrawn; elsewhere each round adds one line.
    """

    def __init__(self, console: Console, trackers: Sequence[Tracker] = ()) -> None:
        self.console = console
        self.trackers = trackers
        self._run: Run | None = None
        self._rounds: list[Round] = []
        self._dense: dict[int, tuple[int, int]] = {}
        self._live: Live | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Watcher:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(self._table() if self._rounds else Text(""))
            self._live.stop()

    def update(self, folder: Path) -> None:
        """Look at a run folder, which need not exist yet."""
        if self._run is None:
            if (folder / FILE).is_file():
                self._run = Run(folder)
            elif self._live is not None:
                self._live.update(
                    Text(f"loading model and data ... {time.monotonic() - self._started:.0f} s", "dim")
                )
            return
        new = self._run.rounds(after=self._rounds[-1].round if self._rounds else -1)
        for row in self._run.traffic(by=("round", "direction")) if new else []:
            if row["direction"] == "up":
                self._dense[row["round"]] = (row["bytes"], row["dense"])
        self._rounds += new
        for tracker in self.trackers:
            for record in new:
                tracker.round(record)
        if self._live is not None:
            self._live.update(Group(self._table(), self._now()))
        else:
            for record in new:
                self.console.print(self._line(record), highlight=False)

    def _metric(self) -> str:
        perplexed = any("perplexity" in _measured(record) for record in self._rounds)
        return "perplexity" if perplexed else "accuracy"

    def _cells(self, record: Round) -> list[str]:
        metrics = _measured(record)
        errors = [record.details[name] for name in _ERRORS if name in record.details]
        up, dense = self._dense.get(record.round, (0, 0))
        return [
            str(record.round),
            number(metrics.get(self._metric())),
            number(metrics.get("loss", record.details.get("loss"))),
            human_bytes(record.bytes_up),
            human_bytes(record.bytes_down),
            f"{dense / up:.1f}x" if up and record.round else "",
            " / ".join(f"{error:.2g}" for error in errors),
            f"{record.participants}"
            + (f" ({record.failures + record.rejected} lost)" if _lost(record) else ""),
            f"{record.seconds:.1f} s",
        ]

    def _table(self) -> Table:
        table = Table(title=self._run.config.name if self._run else None, title_justify="left")
        for name in ("round", self._metric(), "loss", "up", "down", "fewer up", "error", "clients", "time"):
            table.add_column(name, justify="right")
        for record in self._rounds[-_ROWS:]:
            table.add_row(*self._cells(record))
        return table

    def _now(self) -> RenderableType:
        assert self._run is not None
        total = self._run.config.rounds
        done = self._rounds[-1].round if self._rounds else 0
        line = Table.grid(padding=(0, 1))
        line.add_row(
            ProgressBar(total=total, completed=done, width=24),
            Text(f"{done}/{total} rounds"),
            Text(_phase(self._run.phase), "cyan"),
            Text(self._left(done, total), "dim"),
        )
        return line

    def _left(self, done: int, total: int) -> str:
        recent = [record.seconds for record in self._rounds if record.round > 0][-5:]
        if not recent or done >= total:
            return ""
        seconds = (total - done) * sum(recent) / len(recent)
        return f"about {seconds / 60:.1f} min left" if seconds > 90 else f"about {seconds:.0f} s left"

    def _line(self, record: Round) -> str:
        number, metric, loss, up, down, ratio, error, clients, seconds = self._cells(record)
        return (
            f"round {number}  {self._metric()} {metric}  loss {loss}  "
            f"up {up}{f' ({ratio} fewer)' if ratio else ''}  down {down}  "
            f"{f'error {error}  ' if error else ''}clients {clients}  {seconds}"
        )


def _measured(record: Round) -> Mapping[str, float]:
    """What the server measured: before the first round on the tensors that all start from."""
    initial: Mapping[str, float] = record.details.get("initial", {})
    return record.metrics or initial


def _lost(record: Round) -> bool:
    return record.failures + record.rejected > 0


def _phase(phase: dict[str, Any]) -> str:
    if "need" in phase:
        return f"{phase['name']} {phase.get('have', 0)}/{phase['need']}"
    return str(phase.get("name", ""))


@contextmanager
def watching(folder: Path, console: Console, trackers: Sequence[Tracker] = ()) -> Iterator[None]:
    """Show a run that goes on in this process, or below it, for as long as the block lasts."""
    over = threading.Event()
    with Watcher(console, trackers) as watcher:

        def look() -> None:
            while not over.wait(_INTERVAL_S):
                try:
                    watcher.update(folder)
                except StoreError:
                    continue  # being created this very moment: look again

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            if (folder / FILE).is_file():
                watcher.update(folder)
                watcher.update(folder)
