"""What may lie in a run folder, and when a new run may take it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fedllm import run_database, run_lock
from fedllm.errors import StoreError

__all__ = ["clear", "require_free"]

_FIRST = {"config.toml", "provenance.json", "rounds.jsonl", "run.db", run_lock.FILE}
"""What a creation that was cut short can leave."""

_ALL = _FIRST | {
    "run.db-wal", "run.db-shm", "partition.json", "summary.json", "checkpoints", "adapter", "model",
    "report.html", "plots", "clients", "flower.log",
}  # fmt: skip


def require_free(folder: Path, overwrite: bool) -> None:
    """Check that a new run may start in ``folder``.

    Raises:
        StoreError: it holds a run and ``overwrite`` is false, or things that no run put there, or a
            ``run.db`` that is damaged or that a newer fedllm wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file, a run needs a folder: choose another --out")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not present:
        return
    status = _status(folder) if run_database.FILE in present else None
    # Only the lock file or a database of ours proves that fedllm was here: anyone may own a config.toml.
    known = _ALL if status else _FIRST if run_lock.FILE in present else set()
    foreign = sorted(name for name in present if not _belongs(name, known))
    if foreign:
        raise StoreError(f"{folder} holds other things ({foreign[0]}): choose another --out")
    if status and not overwrite:
        raise StoreError(_occupied(folder, status))


def _belongs(name: str, known: set[str]) -> bool:
    # A kill in the middle of replacing a file leaves one that begins with a dot.
    return name in known or name.startswith(tuple(f".{own}-" for own in known))


def _status(folder: Path) -> str:
    with run_database.connect(folder) as connection:
        row = connection.execute("SELECT value FROM meta WHERE key = 'status'").fetchone()
    return str(json.loads(row["value"]))


def _occupied(folder: Path, status: str) -> str:
    if status == "finished":
        return f"{folder} holds a finished run: choose another --out, or give --overwrite"
    return (
        f"{folder} holds a run that is not finished ({status}): "
        f"continue it with fedllm resume {folder}, or give --overwrite"
    )


def clear(folder: Path) -> None:
    """Remove everything but the lock file, after :func:`require_free` has agreed."""
    for path in folder.iterdir():
        if path.name == run_lock.FILE:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
