"""What can be taken away from a run."""

from __future__ import annotations

import csv
import dataclasses
import io
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response

from fedllm.run_database import NodeRound, Round
from server.dashboard.desk import Desk
from server.dashboard.errors import Missing

__all__ = ["File", "respond", "table"]

File = Literal["adapter.zip", "report.html", "rounds.csv", "answers.csv", "config.toml", "summary.json"]
_TYPES = {"csv": "text/csv; charset=utf-8", "html": "text/html; charset=utf-8", "toml": "application/toml",
          "json": "application/json", "zip": "application/zip"}  # fmt: skip


def respond(desk: Desk, name: str, file: File) -> Response:
    """Answer with a file of a run.

    Raises:
        Missing: the run has none, and says why.
    """
    folder = desk.shelf.folder(name)
    headers = {"Content-Disposition": _attachment(f"{name}-{file}")}
    kind = _TYPES[file.rpartition(".")[2]]
    if file == "adapter.zip":
        path = _zip(folder)
        return FileResponse(path, media_type=kind, headers=headers, background=BackgroundTask(path.unlink))
    if file == "report.html":
        headers["Content-Security-Policy"] = (
            "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        )
        return FileResponse(desk.launcher.report(name), media_type=kind, headers=headers)
    if file == "rounds.csv":
        return Response(table(Round, desk.shelf.rounds(name)), media_type=kind, headers=headers)
    if file == "answers.csv":
        return Response(table(NodeRound, desk.shelf.run(name).nodes()), media_type=kind, headers=headers)
    if not (folder / file).is_file():
        raise Missing(f"{name} has no {file}: fedllm resume writes it anew")
    return FileResponse(folder / file, media_type=kind, headers=headers)


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


def _zip(folder: Path) -> Path:
    """Pack ``adapter/`` or ``model/`` into a temporary file."""
    result = next((folder / kind for kind in ("adapter", "model") if (folder / kind).is_dir()), None)
    if result is None:
        raise Missing(f"{folder.name} has no result yet: it is written after the last round")
    with tempfile.NamedTemporaryFile(prefix="fedllm-", suffix=".zip", delete=False) as file:
        # Tensors do not get smaller by deflating; storing them is quick.
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
            for path in sorted(result.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    packed.write(path, path.relative_to(folder))
        return Path(file.name)


def _attachment(name: str) -> str:
    return f"attachment; filename*=UTF-8''{quote(name)}"
