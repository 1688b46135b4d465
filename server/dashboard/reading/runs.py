"""The folder of runs as the dashboard sees it. Everything is kept until a file of the run changes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fedllm.config import RunConfig
from fedllm.errors import FedllmError, StoreError
from fedllm.measures import leading
from fedllm.runs import lock as run_lock
from fedllm.runs.reader import Run, find
from fedllm.runs.records import FILE, RoundRecord
from fedllm.runs.summary import best_of
from fedllm.runs.totals import NodeTotal, glance, node_totals, records_mark
from server.dashboard.errors import Missing
from server.dashboard.reading.trend import Verdict, trend

__all__ = ["Overview", "RunIndex", "Traffic"]

_FILES = (FILE, f"{FILE}-wal", "summary.json")
LONGEST_NAME = 255
"""Bytes that the file systems of today allow."""
Found = TypeVar("Found")
Stamp = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """One run in one line of the list.

    Attributes:
        name: of its folder.
        state: ``starting``, ``running``, ``paused``, ``finished``, ``failed``, ``stopped``, ``interrupted``
            (killed), or ``unreadable``.
        round, rounds: committed, and planned.
        metric, value, series: what quality is measured by, its last value, and its value by round.
        best, best_round: the best value of the metric that decides, and its round; None where unmeasured.
        bytes_up, bytes_down, dense_up, dense_down: what crossed, and what it would have been without codecs.
        reference_bytes: FedAvg of the whole model in fp32, both ways.
        seconds, seconds_left: wall time so far, and expected until the last round; None where unknown.
        round_seconds: mean of the last five rounds.
        phase: what a live run is doing; see :attr:`fedllm.runs.reader.Run.phase`.
        reason: why it failed or cannot be read.
        ended_early: why it is finished with fewer rounds than planned; empty where it is not.
        changed_at: Unix time of the last change on disk.
        progress_at: Unix time of its last progress: a round ended, or it went over to something else.
        quorum: answers that a round needs; 0 for runs that are over.
        pending: orders that it has not obeyed yet.
        trend: what is getting worse, if anything is.
    """

    name: str
    state: str
    method: str = ""
    model: str = ""
    dataset: str = ""
    clients: int = 0
    round: int = 0
    rounds: int = 0
    metric: str = ""
    value: float | None = None
    series: list[float] = field(default_factory=list)
    best: float | None = None
    best_round: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    dense_up: int = 0
    dense_down: int = 0
    reference_bytes: int = 0
    seconds: float = 0.0
    seconds_left: float | None = None
    round_seconds: float | None = None
    failures: int = 0
    rejected: int = 0
    epsilon: float | None = None
    phase: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    ended_early: str = ""
    changed_at: float = 0.0
    progress_at: float = 0.0
    quorum: int = 0
    pending: list[str] = field(default_factory=list)
    trend: Verdict | None = None

    @property
    def live(self) -> bool:
        """Whether a process works on it."""
        return self.state in ("running", "paused")


class Traffic(NamedTuple):
    """Bytes of one round, and what they would have been without a codec."""

    round: int
    up: int
    down: int
    dense_up: int
    dense_down: int


class RunIndex:
    """Reads the runs below ``root``; threads may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._kept: dict[tuple[str, str], tuple[Stamp, Any]] = {}
        self._guard = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of all runs."""
        return [folder.name for folder in find(self.root) if _speakable(folder.name)]

    def folder(self, name: str) -> Path:
        """Return a run's folder.

        Raises:
            Missing: there is no run of this name.
        """
        folder = self.root / name
        if not _speakable(name) or not (folder / FILE).is_file():
            raise Missing(f"there is no run {name!r}")
        return folder

    def run(self, name: str) -> Run:
        """Open a run."""
        return Run(self.folder(name))

    def stamp(self, name: str) -> Stamp:
        """Return something that differs once a run has changed."""
        return _stamp(self.folder(name))

    def records_stamp(self, name: str) -> Stamp:
        """Return something that differs once a run's rounds, answers or events have changed.

        Unlike :meth:`stamp` it stays while a run only says what it is doing, many times a round.
        """
        folder = self.folder(name)
        return self._keep("records", folder, _stamp(folder), records_mark)

    def drop(self, name: str) -> None:
        """Forget what was read of a run: something in the middle of its records has changed."""
        with self._guard:
            for key in [key for key in self._kept if key[1] == name]:
                del self._kept[key]

    def overviews(self) -> list[Overview]:
        """Return all runs: live ones first, then the latest change first."""
        found = [
            self._kept_overview(folder) if _speakable(folder.name) else _unspeakable(folder)
            for folder in find(self.root)
        ]
        return sorted(found, key=lambda view: (not view.live, -view.changed_at, view.name))

    def overview(self, name: str) -> Overview:
        """Return one run."""
        return self._kept_overview(self.folder(name))

    def rounds(self, name: str) -> list[RoundRecord]:
        """Return a run's committed rounds."""
        return self._keep(
            "rounds", self.folder(name), self.records_stamp(name), lambda folder: Run(folder).rounds()
        )

    def traffic(self, name: str) -> list[Traffic]:
        """Return what crossed in each round, ascending."""
        return self._keep("traffic", self.folder(name), self.records_stamp(name), _traffic)

    def nodes(self, name: str) -> list[NodeTotal]:
        """Return the clients of a run, over all its rounds."""
        return self._keep("nodes", self.folder(name), self.records_stamp(name), node_totals)

    def _kept_overview(self, folder: Path) -> Overview:
        return self._keep("overview", folder, _stamp(folder), _overview)

    def _keep(self, what: str, folder: Path, stamp: Stamp, read: Callable[[Path], Found]) -> Found:
        key = (what, folder.name)
        with self._guard:
            kept = self._kept.get(key)
        if kept is None or kept[0] != stamp:
            kept = (stamp, read(folder))
            with self._guard:
                self._kept[key] = kept
        found: Found = kept[1]
        return found


def _speakable(name: str) -> bool:
    """Whether a folder's name can stand in an address and in JSON, and be one at all."""
    if not name.isprintable() or name == "" or name.startswith("."):
        return False
    return "/" not in name and len(os.fsencode(name)) <= LONGEST_NAME


def _unspeakable(folder: Path) -> Overview:
    reason = "the name of its folder holds what cannot be shown: rename it"
    return Overview(name=ascii(folder.name)[1:-1], state="unreadable", reason=reason)


def _stamp(folder: Path) -> Stamp:
    # The process is part of it: a run that is killed changes no file.
    return (*(_mark(folder / name) for name in _FILES), run_lock.holder(folder))


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _changed_at(folder: Path) -> float:
    return max((mark[0] for name in _FILES if (mark := _mark(folder / name))), default=0) / 1e9


def _overview(folder: Path) -> Overview:
    try:
        return _read_overview(folder)
    except FedllmError as error:
        # A run appears with its database; its summary follows within a moment.
        begins = isinstance(error.__cause__, FileNotFoundError) and run_lock.holder(folder) is not None
        state, reason = ("starting", "") if begins else ("unreadable", str(error))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        state = "unreadable"
        reason = f"{folder} holds what no run of this version writes: {type(error).__name__} {error}"
    return Overview(name=folder.name, state=state, reason=reason, changed_at=_changed_at(folder))


def _read_overview(folder: Path) -> Overview:
    # Asked first: a run that ends writes its status before it lets go of the folder.
    alive = run_lock.holder(folder) is not None
    found = glance(folder)
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {folder}: {error}; fedllm resume repairs its text files") from error
    measured = [(record.round, record.metrics) for record in found.rounds if record.metrics]
    config = RunConfig.from_json(found.config)
    best = best_of(measured, config.metric)
    metric = leading({name for _, metrics in measured for name in metrics}, config.metric)
    seconds = [record.seconds for record in found.rounds if record.round > 0][-5:]
    mean = sum(seconds) / len(seconds) if seconds else None
    done = found.rounds[-1].round if found.rounds else 0
    state = _state(found.status, found.phase, alive)
    moved, under_way = summary["bytes"], state in ("running", "paused")
    progress_at = max(found.phase.get("moved_at", 0.0), found.rounds[-1].finished_at if found.rounds else 0.0)
    return Overview(
        name=folder.name,
        state=state,
        method=summary["method"],
        model=summary["model"],
        dataset=summary["dataset"],
        clients=summary["clients"],
        round=done,
        rounds=summary["rounds"],
        metric=metric,
        value=summary["metrics"].get(metric),
        series=[metrics[metric] for _, metrics in measured if metrics.get(metric) is not None],
        best=best and best.value,
        best_round=best and best.round,
        bytes_up=moved["up"],
        bytes_down=moved["down"],
        dense_up=moved["dense_up"],
        dense_down=moved["dense_down"],
        reference_bytes=moved["reference_total"],
        seconds=summary["seconds"]["total"],
        seconds_left=mean * (summary["rounds"] - done) if mean is not None and under_way else None,
        round_seconds=mean,
        failures=summary["failures"],
        rejected=summary["rejected"],
        epsilon=summary["privacy"]["epsilon"],
        phase=found.phase,
        reason=found.failure,
        ended_early=summary.get("ended_early") or "",
        changed_at=_changed_at(folder),
        progress_at=progress_at or _changed_at(folder),
        quorum=config.quorum if under_way else 0,
        pending=found.pending if under_way else [],
        trend=trend(measured),
    )


def _state(status: str, phase: dict[str, Any], alive: bool) -> str:
    if status != "running":
        return status
    if not alive:
        return "interrupted"
    return "paused" if phase.get("name") == "paused" else "running"


def _traffic(folder: Path) -> list[Traffic]:
    found: dict[int, dict[str, int]] = {}
    for row in Run(folder).traffic(("round", "direction")):
        sums = found.setdefault(row["round"], dict.fromkeys(("up", "down", "dense_up", "dense_down"), 0))
        sums[row["direction"]], sums[f"dense_{row['direction']}"] = row["bytes"], row["dense"]
    return [Traffic(number, **sums) for number, sums in found.items()]
