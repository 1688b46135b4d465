"""The folder of runs as the dashboard sees it. Everything is kept until a file of the run changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fedllm import run_database, run_lock
from fedllm.durable import disk_errors
from fedllm.errors import FedllmError, StoreError
from fedllm.run_database import Round
from fedllm.runs import Run, find
from server.dashboard.errors import Missing
from server.dashboard.totals import NodeTotal, node_totals

__all__ = ["Overview", "Shelf", "Traffic"]

_FILES = (run_database.FILE, f"{run_database.FILE}-wal", "rounds.jsonl", "summary.json")
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
        bytes_up, bytes_down, dense_up, dense_down: what crossed, and what it would have been without codecs.
        reference_bytes: FedAvg of the whole model in fp32, both ways.
        seconds, seconds_left: wall time so far, and expected until the last round; None where unknown.
        round_seconds: mean of the last five rounds.
        phase: what a live run is doing; see :attr:`fedllm.runs.Run.phase`.
        reason: why it failed or cannot be read.
        changed_at: Unix time of the last change on disk.
    """

    name: str
    state: str
    method: str = ""
    model: str = ""
    dataset: str = ""
    clients: int = 0
    round: int = 0
    rounds: int = 0
    metric: str = "accuracy"
    value: float | None = None
    series: list[float] = field(default_factory=list)
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
    changed_at: float = 0.0

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


class Shelf:
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
        if not _speakable(name) or not (folder / run_database.FILE).is_file():
            raise Missing(f"there is no run {name!r}")
        return folder

    def run(self, name: str) -> Run:
        """Open a run."""
        return Run(self.folder(name))

    def stamp(self, name: str) -> Stamp:
        """Return something that differs once a run has changed."""
        return _stamp(self.folder(name))

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

    def rounds(self, name: str) -> list[Round]:
        """Return a run's committed rounds."""
        return self._keep("rounds", self.folder(name), lambda folder: Run(folder).rounds())

    def traffic(self, name: str) -> list[Traffic]:
        """Return what crossed in each round, ascending."""
        return self._keep("traffic", self.folder(name), _traffic)

    def nodes(self, name: str) -> list[NodeTotal]:
        """Return the clients of a run, over all its rounds."""
        return self._keep("nodes", self.folder(name), node_totals)

    def _kept_overview(self, folder: Path) -> Overview:
        return self._keep("overview", folder, _overview)

    def _keep(self, what: str, folder: Path, read: Callable[[Path], Found]) -> Found:
        stamp, key = _stamp(folder), (what, folder.name)
        with self._guard:
            kept = self._kept.get(key)
        if kept is None or kept[0] != stamp:
            kept = (stamp, read(folder))
            with self._guard:
                self._kept[key] = kept
        found: Found = kept[1]
        return found


def _speakable(name: str) -> bool:
    """Whether a folder's name can stand in an address and in JSON."""
    return name.isprintable() and "/" not in name and name != "" and not name.startswith(".")


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
    with disk_errors(folder), run_database.connect(folder) as connection:
        wanted = "SELECT key, value FROM meta WHERE key IN ('status', 'phase')"
        meta = {row["key"]: json.loads(row["value"]) for row in connection.execute(wanted)}
        query = "SELECT message FROM events WHERE kind = 'failed' ORDER BY id DESC LIMIT 1"
        failed = connection.execute(query).fetchone() if meta["status"] == "failed" else None
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        text = (folder / "rounds.jsonl").read_bytes()
        # A line without its end is being written this very moment.
        lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {folder}: {error}; fedllm resume repairs its text files") from error
    metric = "perplexity" if summary["metrics"]["perplexity"] is not None else "accuracy"
    source = metric if any(line.get(metric) is not None for line in lines) else "loss"
    seconds = [line["seconds"] for line in lines[-5:]]
    mean = sum(seconds) / len(seconds) if seconds else None
    done = lines[-1]["round"] if lines else 0
    state = _state(meta["status"], meta["phase"], alive)
    moved = summary["bytes"]
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
        value=summary["metrics"][metric],
        series=[line[source] for line in lines if line.get(source) is not None],
        bytes_up=moved["up"],
        bytes_down=moved["down"],
        dense_up=moved["dense_up"],
        dense_down=moved["dense_down"],
        reference_bytes=moved["reference_total"],
        seconds=summary["seconds"]["total"],
        seconds_left=mean * (summary["rounds"] - done)
        if mean is not None and state in ("running", "paused")
        else None,
        round_seconds=mean,
        failures=summary["failures"],
        rejected=summary["rejected"],
        epsilon=summary["privacy"]["epsilon"],
        phase=meta["phase"],
        reason=failed["message"] if failed else "",
        changed_at=_changed_at(folder),
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
