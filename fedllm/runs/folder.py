"""What may lie in a run folder, and when a new run may take it."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from fedllm.errors import StoreError
from fedllm.runs import database
from fedllm.runs import lock as run_lock
from fedllm.runs.durable import replace_file, to_json
from fedllm.runs.provenance.chain import KEY
from fedllm.runs.records import FILE
from fedllm.runs.summary import describe_partition

__all__ = [
    "BEST_RESULTS",
    "GIVEN",
    "PRIVACY",
    "RESULTS",
    "clear",
    "require_apart",
    "require_free",
    "write_partition",
]

PRIVACY = "privacy.json"
"""What a differentially private run has spent, and the secret that its noise comes of."""
GIVEN = "given"
"""Folder of what was given from memory; it is there before the run is."""

_FIRST = {"config.toml", "provenance.json", "rounds.jsonl", "run.db", run_lock.FILE, GIVEN}
"""What a creation that was cut short can leave."""

RESULTS = ("adapter", "model")
"""Folders in which a run leaves the result of its last round: the one or the other."""
BEST_RESULTS = tuple(f"{name}-best" for name in RESULTS)
"""The same of its best round."""

_ALL = _FIRST | {
    "run.db-wal", "run.db-shm", "partition.json", "summary.json", "checkpoints", *RESULTS, *BEST_RESULTS,
    "report.html", "plots", "clients", "flower.log", KEY, PRIVACY,
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
    status = _status(folder) if FILE in present else None
    # Only the lock file or a database of ours proves that fedllm was here: anyone may own a config.toml.
    known = _ALL if status else _FIRST if run_lock.FILE in present else set()
    foreign = sorted(name for name in present if not _belongs(name, known))
    if foreign:
        raise StoreError(f"{folder} holds other things ({foreign[0]}): choose another --out")
    if status and not overwrite:
        raise StoreError(_occupied(folder, status))


def require_apart(folder: Path, source: str | None) -> None:
    """Check that a new run in ``folder`` would not replace what it begins from.

    Args:
        folder: of the new run.
        source: its ``init_from``.

    Raises:
        StoreError: it would.
    """
    if source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"init_from = {source!r} lies where the new run would: choose another --out")


def _belongs(name: str, known: set[str]) -> bool:
    # A kill in the middle of replacing a file leaves one that begins with a dot.
    return name in known or name.startswith(tuple(f".{own}-" for own in known))


def _status(folder: Path) -> str:
    with database.connect(folder) as connection:
        return str(database.meta(connection, "status"))


def _occupied(folder: Path, status: str) -> str:
    if status == "finished":
        return f"{folder} holds a finished run: choose another --out, or give --overwrite"
    return (
        f"{folder} holds a run that is not finished ({status}): "
        f"continue it with fedllm resume {folder}, or give --overwrite"
    )


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything but the lock file and ``keep``, after :func:`require_free` has agreed."""
    for path in folder.iterdir():
        if path.name == run_lock.FILE or path.name in keep:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_partition(
    folder: Path,
    indices: Sequence[Sequence[int]],
    labels: Sequence[int] | None = None,
    label_names: Sequence[str] = (),
    held_out: Sequence[int] = (),
) -> None:
    """Write ``partition.json``: which texts each client holds, how many of each class, and the test set.

    Args:
        folder: the run folder.
        indices: per client, the numbers of its texts in the training set: of what was read less what is
            held out, in order.
        labels: class of every text of the training set.
        label_names: names of the classes.
        held_out: the numbers of the test set's texts among all that were read, from 0.
    """
    described = describe_partition(indices, labels, label_names, held_out)
    replace_file(folder / "partition.json", to_json(described))
