"""Which runs a device keeps the state of: the newest few, and of those no more bytes than it was told.

A run that ended may be taken further, one that was stopped may be resumed, and a device cannot know which
will be. So nothing is collected for its age alone, however long the device was away, only to make room for
another run: first runs whose last round was seen here, then those that were worked on longest ago. A run
that is resumed after all starts this node's part anew, and its answer says so (``state_lost``).
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedllm.runs.durable import disk_errors, replace_file

__all__ = ["KEEP_RUNS", "Bounds", "collect", "mark"]

KEEP_RUNS = 4
"""Of so many runs a device keeps the state, unless it is told otherwise."""

_MARK = "used"
"""File in a run's folder: its place in the order of use, and whether its last round was seen."""
_ENDED = "ended"
_GONE = ".gone"
"""Ending of a folder that is being deleted; no run's name holds a dot."""


@dataclass(frozen=True)
class Bounds:
    """How much state a device keeps.

    Attributes:
        runs: state of so many runs, at least 1.
        bytes: of all of them together; 0 sets no limit.
    """

    runs: int = KEEP_RUNS
    bytes: int = 0

    @property
    def limit(self) -> str:
        """The limit of bytes in words."""
        return f"{self.bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class _Kept:
    folder: Path
    ended: bool
    used: int

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def mark(state: Path, run: str, *, ended: bool) -> None:
    """Note that a run is worked on; the order of use needs no clock, which a device may have wrong.

    Args:
        state: folder of the device's durable state, of all runs.
        run: the run's identity, which names its folder.
        ended: whether this is its last round.
    """
    others = [kept.used for kept in _kept(state) if kept.folder.name != run]
    before = _read(state / run)
    used = before.used if before.used > max(others, default=0) else max(others, default=0) + 1
    now = _Kept(state / run, ended, used)
    if now != before:
        with disk_errors(now.folder):
            now.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(now.folder / _MARK, f"{used} {_ENDED if ended else ''}".encode(), mode=0o600)


def collect(state: Path, bounds: Bounds, current: str = "") -> list[str]:
    """Delete the state of runs beyond the bounds.

    Args:
        state: folder of the device's durable state, of all runs.
        bounds: how much is kept.
        current: the run that is worked on, which is kept whatever it takes; it need not have any state yet.

    Returns:
        A sentence for each run that had to go, and one where the current run alone takes too much.
    """
    for left in state.glob(f"*{_GONE}"):  # the device went down while it deleted
        shutil.rmtree(left, ignore_errors=True)
    runs = _kept(state)
    said = []
    held = sum(run.size for run in runs if run.folder.name == current)
    if 0 < bounds.bytes < held:
        said.append(
            f"the state of run {current} alone takes more than --state-limit, {bounds.limit}; raise it"
        )
    places = bounds.runs - bool(current)
    others = [run for run in runs if run.folder.name != current]
    for run in sorted(others, key=lambda run: (not run.ended, run.used), reverse=True):
        size = run.size
        too_large = 0 < bounds.bytes < held + size
        if places > 0 and not too_large:
            places, held = places - 1, held + size
            continue
        kept = f"--state-limit is {bounds.limit}" if places > 0 else f"--keep-runs is {bounds.runs}"
        said.append(_delete(run.folder, f"the state of run {run.folder.name}, {size / 1e6:.1f} MB", kept))
    return said


def _kept(state: Path) -> list[_Kept]:
    if not state.is_dir():
        return []
    folders = [path for path in state.iterdir() if path.is_dir() and path.suffix != _GONE]
    return [_read(folder) for folder in folders if _holds_state(folder)]


def _holds_state(folder: Path) -> bool:
    """Whether a folder is a run's: Flower's own, which lies beside them, holds nothing of the kind."""
    return (folder / _MARK).exists() or any(
        next(folder.glob(pattern), None)
        for pattern in ("local-*-*.*", "reply-*-*.bin", "global-*.safetensors")
    )


def _read(folder: Path) -> _Kept:
    """Read a run's mark; a run without one, as versions before this left it, was used before all others."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        used, _, ended = (folder / _MARK).read_text(encoding="utf-8").partition(" ")
        return _Kept(folder, ended == _ENDED, int(used))
    return _Kept(folder, ended=False, used=0)


def _delete(folder: Path, what: str, why: str) -> str:
    """Delete a run's state all at once: half of it would be another state."""
    gone = folder.with_name(folder.name + _GONE)
    try:
        folder.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:  # no reason to refuse the work at hand
        return f"{what}, cannot be deleted: {error.strerror or error} ({why})"
    return f"{what}, is deleted ({why}): if that run goes on, this node starts its part anew and says so"
