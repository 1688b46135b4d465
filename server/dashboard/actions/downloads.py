"""What can be taken away from a run."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from fedllm.runs.folder import BEST_RESULTS, RESULTS
from fedllm.runs.records import NodeRound, RoundRecord
from server.dashboard.actions.operations import Operations
from server.dashboard.errors import Missing

__all__ = ["File", "lacking", "respond", "table"]

File = Literal[
    "adapter.zip",
    "adapter-best.zip",
    "report.html",
    "rounds.csv",
    "answers.csv",
    "config.toml",
    "summary.json",
]
_TYPES = {"csv": "text/csv; charset=utf-8", "html": "text/html; charset=utf-8", "toml": "application/toml",
          "json": "application/json", "zip": "application/zip"}  # fmt: skip


async def respond(ops: Operations, name: str, file: File, round: int | None = None) -> Response:
    """Answer with a file of a run; what has to be made first is made beside the threads that serve pages.

    Args:
        ops: knows the run.
        name: of the run.
        file: which one.
        round: of the checkpoint whose adapter is wanted; unset takes the last.

    Raises:
        Missing: the run has none, and says why.
    """
    if round is not None and file != "adapter.zip":
        raise Missing(f"a round goes with adapter.zip: there is one {file} of a run")
    folder = ops.index.folder(name)
    of_round = "" if round is None else f"-round-{round}"
    headers = {"Content-Disposition": _attachment(f"{name}{of_round}-{file}")}
    if file == "report.html":
        headers["Content-Security-Policy"] = (
            "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        )
    if file in ("config.toml", "summary.json"):
        path = _own(folder, file)
        if not path.is_file():
            raise Missing(f"{name} has no {file}: fedllm resume writes it anew")
    else:
        stamp, make = await run_in_threadpool(_making, ops, folder, file, round)
        # Names differ in more than files may be called.
        key = f"{hashlib.sha256(name.encode()).hexdigest()[:32]}{of_round}-{file}"
        path = await ops.prepared.file(key, stamp, make)
    return FileResponse(path, media_type=_TYPES[file.rpartition(".")[2]], headers=headers)


def _making(
    ops: Operations, folder: Path, file: File, round: int | None
) -> tuple[object, Callable[[Path], None]]:
    """Return what a file depends on, and what writes it."""
    name = folder.name
    if file == "adapter.zip":
        return _packing(ops, folder, round, RESULTS)
    if file == "adapter-best.zip":
        return _packing(ops, folder, _best(ops, folder), BEST_RESULTS)
    if file == "report.html":
        return ops.index.stamp(name), lambda place: _copy(ops.launcher.report(name), place)
    if file == "rounds.csv":
        return ops.index.records_stamp(name), lambda place: _write(
            place, table(RoundRecord, ops.index.rounds(name))
        )
    return ops.index.records_stamp(name), lambda place: _write(
        place, table(NodeRound, ops.index.run(name).nodes())
    )


def _copy(source: Path, place: Path) -> None:
    shutil.copyfile(_own(source.parent, source.name), place)


def _write(place: Path, text: str) -> None:
    place.write_text(text, encoding="utf-8")


def _own(folder: Path, name: str) -> Path:
    """Return what lies in a run's folder, unless it is a link that leads somewhere else.

    Raises:
        Missing: it is a link.
    """
    path = folder / name
    if path.is_symlink():
        raise Missing(f"{name} of {folder.name} is a link, which may lead anywhere: it is not given out")
    return path


def table(kind: type[Any], records: Iterable[Any]) -> str:
    """Write records as CSV; numbers within ``metrics`` become columns of their own.

    >>> table(NodeRound, [NodeRound(round=1, node=0, status="late", reason="=1+1")]).splitlines()[1][:20]
    "1,0,late,0,fit,'=1+1"
    """
    rows = list(records)
    own = [field.name for field in dataclasses.fields(kind) if field.name not in ("metrics", "details")]
    further = sorted({name for row in rows for name in row.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*own, *further])
    for row in rows:
        metrics: Mapping[str, float] = row.metrics
        writer.writerow([_cell(getattr(row, name)) for name in own] + [metrics.get(name) for name in further])
    return text.getvalue()


def _cell(value: Any) -> Any:
    # A spreadsheet would take a client's words for a formula.
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


def lacking(ops: Operations, name: str, file: File) -> str:
    """Return why a result of a run cannot be had; empty where there is one, or a checkpoint to make it of."""
    if file not in ("adapter.zip", "adapter-best.zip"):
        return ""
    try:
        _making(ops, ops.index.folder(name), file, None)
    except Missing as error:
        return str(error)
    return ""


def _best(ops: Operations, folder: Path) -> int:
    best = ops.index.overview(folder.name).best_round
    if best is None:
        raise Missing(f"{folder.name} has measured nothing yet, and so has no best round")
    return best


def _packing(
    ops: Operations, folder: Path, round: int | None, results: Sequence[str]
) -> tuple[object, Callable[[Path], None]]:
    """Pack the result, which a run leaves at its end and forgets once it goes on, or make a checkpoint's.

    Args:
        ops: knows the run.
        folder: of the run.
        round: whose result is wanted; unset is the last one's.
        results: names of the folders of which one holds it, if the run has ended.
    """
    left = [path for kind in results if (path := _own(folder, kind)).is_dir()]
    held = ops.checkpoints(folder.name)
    if left and (results == BEST_RESULTS or round in (None, *held[-1:])):
        packed = [path for path in sorted(left[0].rglob("*")) if path.is_file() and not path.is_symlink()]
        marks = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in packed)
        return marks, lambda place: _zip(folder, packed, place)
    if not held:
        raise Missing(f"{folder.name} has no result yet: its first checkpoint comes with the first round")
    if round is not None and round not in held:
        known = ", ".join(map(str, held))
        raise Missing(f"{folder.name} has no checkpoint of round {round}; its checkpoints are {known}")
    wanted = held[-1] if round is None else round
    written = (folder / "checkpoints" / f"round-{wanted:06d}" / "state.json").stat()

    def make(place: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="fedllm-") as beside:
            made = Path(beside) / "out"
            ops.launcher.export(folder.name, wanted, made)
            _zip(made, (path for path in sorted(made.rglob("*")) if path.is_file()), place)

    return (wanted, written.st_mtime_ns, written.st_ino), make


def _zip(folder: Path, paths: Iterable[Path], place: Path) -> None:
    # Tensors do not get smaller by deflating; storing them is quick.
    with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as packed:
        for path in paths:
            packed.write(path, path.relative_to(folder))


def _attachment(name: str) -> str:
    return f"attachment; filename*=UTF-8''{quote(name)}"
