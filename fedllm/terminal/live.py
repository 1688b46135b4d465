"""What people watch while a run goes on: a table of rounds and a line that says what happens now."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedllm.errors import StoreError
from fedllm.measures import leading
from fedllm.runs.reader import Run
from fedllm.runs.records import FILE, RoundRecord
from fedllm.runs.summary import SIMULATED
from fedllm.runs.trackers import Tracker
from fedllm.wording import human_bytes, human_seconds, number, saved

__all__ = ["Watcher", "watching"]

_ROWS = 20
_ERRORS = ("error_up", "error_down")
"""Of what the codecs decode, against what was encoded: relative, shown as up / down."""
_INTERVAL_S = 0.25


class Watcher:
    """Reads a run folder and shows what is new in it; the run itself is never asked.

    On a terminal the table is redrawn; elsewhere each round adds one line.

    Args:
        console: where to show it.
        trackers: are told of every round.
        label: goes before each line, for one run of many.
    """

    def __init__(self, console: Console, trackers: Sequence[Tracker] = (), label: str = "") -> None:
        self.console = console
        self.trackers = trackers
        self.label = label
        self._run: Run | None = None
        self._since, self._event = time.time(), 0
        self._rounds: list[RoundRecord] = []
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
        self._warn()
        for tracker in self.trackers:
            for record in new:
                tracker.round(record)
        if self._live is not None:
            self._live.update(Group(self._table(), self._now()))
        else:
            for record in new:
                self.console.print(
                    f"{self.label}  {self._line(record)}" if self.label else self._line(record)
                )

    def _warn(self) -> None:
        """Say what the run warns of in a round; what comes before the first, its own process says."""
        assert self._run is not None
        for event in self._run.events(after=self._event):
            self._event = event.id
            if event.kind == "warning" and event.round is not None and event.at >= self._since:
                self.console.print(Text(f"warning: {event.message}", "yellow"))

    def _metric(self) -> str:
        assert self._run is not None
        return leading({name for record in self._rounds for name in record.metrics}, self._run.config.metric)

    def _cells(self, record: RoundRecord) -> list[str]:
        assert self._run is not None
        metrics, metric = record.metrics, self._metric()
        errors = [record.details[name] for name in _ERRORS if name in record.details]
        up, dense = self._dense.get(record.round, (0, 0))
        return [
            str(record.round),
            number(metrics.get(metric)),
            "" if metric == "loss" else number(metrics.get("loss", record.details.get("loss"))),
            human_bytes(record.bytes_up),
            human_bytes(record.bytes_down),
            saved(up, dense, self._run.config.codec.up) if record.round else "",
            " / ".join(f"{error:.2g}" for error in errors),
            f"{record.participants}"
            + (f" ({record.failures + record.rejected} lost)" if _lost(record) else ""),
            "" if record.epsilon is None else number(record.epsilon),
            f"{record.seconds:.1f} s",
            human_seconds(record.details[SIMULATED]) if SIMULATED in record.details else "",
        ]

    def _table(self) -> Table:
        table = Table(title=self._run.config.name if self._run else None, title_justify="left")
        names = (
            "round",
            self._metric(),
            "loss",
            "up",
            "down",
            "saved up",
            "codec error",
            "clients",
            "epsilon",
            "time",
            "simulated",
        )
        columns = zip(*(self._cells(record) for record in self._rounds[-_ROWS:]), strict=True)
        shown = [(name, cells) for name, cells in zip(names, columns, strict=True) if any(cells)]
        for name, _ in shown:
            table.add_column(name, justify="right")
        for row in zip(*(cells for _, cells in shown), strict=True):
            table.add_row(*row)
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

    def _line(self, record: RoundRecord) -> str:
        number, metric, loss, up, down, saves, error, clients, epsilon, seconds, simulated = self._cells(
            record
        )
        return (
            f"round {number}  {self._metric()} {metric}  {f'loss {loss}  ' if loss else ''}"
            f"up {up}{f' ({saves})' if saves else ''}  down {down}  "
            f"{f'codec error {error}  ' if error else ''}clients {clients}  "
            f"{f'epsilon {epsilon}  ' if epsilon else ''}{seconds}"
            f"{f' ({simulated} simulated)' if simulated else ''}"
        )


def _lost(record: RoundRecord) -> bool:
    return record.failures + record.rejected > 0


def _phase(phase: dict[str, Any]) -> str:
    if "need" in phase:
        return f"{phase['name']} {phase.get('have', 0)}/{phase['need']}"
    return str(phase.get("name", ""))


@contextmanager
def watching(
    folder: Path, console: Console, trackers: Sequence[Tracker] = (), label: str = ""
) -> Iterator[None]:
    """Show a run that goes on in this process, or below it, for as long as the block lasts."""
    over = threading.Event()
    with Watcher(console, trackers, label) as watcher:

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
