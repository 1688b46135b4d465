"""Rows of text from files, folders and the hub, with errors that name the file and the line.

Local files are read by the standard library (and pyarrow for parquet): importing ``datasets`` costs more
than reading most files.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.bundled import CORPORA, corpus_folder
from fedllm.config import DataConfig
from fedllm.errors import DataError

__all__ = ["Row", "read_rows"]

_SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row as it was found: its columns, the file it came from, and where (for messages)."""

    columns: Mapping[str, Any]
    file: str
    where: str


def read_rows(config: DataConfig) -> Iterator[Row]:
    """Yield every row of the configured text, in an order that does not depend on the file system.

    Raises:
        DataError: nothing is there, or a row cannot be read; names the file and the line.
    """
    if config.path is None:
        return _class_folders(corpus_folder(config.name)) if config.name in CORPORA else _hub(config.name)
    path = Path(config.path).expanduser()
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise DataError(f"data.path = {config.path!r} does not exist")
    files = sorted(item for item in path.iterdir() if item.suffix.lower() in _SUFFIXES)
    if files:
        return (row for file in files for row in _file(file))
    if any(path.glob("*/*.txt")):
        return _class_folders(path)
    raise DataError(
        f"data.path = {config.path!r} holds neither {', '.join(_SUFFIXES)} files "
        "nor one folder of .txt files per class"
    )


def _file(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"{path} is of no known kind; {', '.join(_SUFFIXES)} files are read")
    return {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[suffix](path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                columns = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(columns, dict):
                raise DataError(
                    f"{where}: a JSON object with named columns is wanted, not {type(columns).__name__}"
                )
            yield Row(columns, path.name, where)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        line = 1
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for values in reader:
                where = f"{path}, line {line}"
                line = reader.line_num + 1
                if not values:
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"{where}: {len(values)} fields where the header names {len(header)} columns"
                    )
                yield Row(dict(zip(header, values, strict=True)), path.name, where)
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: not valid CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, at or after line {line}: not UTF-8 text ({error.reason})") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]  # ships no stubs
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for columns in batch.to_pylist():
                number += 1
                yield Row(columns, path.name, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def _class_folders(root: Path) -> Iterator[Row]:
    """One folder per class, one .txt file per text; the columns are named text and label."""
    for folder in sorted(item for item in root.iterdir() if item.is_dir()):
        for file in sorted(folder.glob("*.txt")):
            yield Row({"text": _decode(file.read_bytes()), "label": folder.name}, folder.name, str(file))


def _decode(raw: bytes) -> str:
    """Decode UTF-8, and Latin-1 where it is not that: the BBC corpus mixes both."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _hub(name: str) -> Iterator[Row]:
    """The train split of a hub data set, ``owner/name`` or ``owner/name:configuration``."""
    import datasets

    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split="train")
    except Exception as error:  # the library raises whatever its loaders, scripts and network raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"data.name = {name!r} is not bundled ({', '.join(CORPORA)}) and its train split cannot be "
            f"loaded from the hub: {reason}"
        ) from error
    classes = {k: f.names for k, f in rows.features.items() if isinstance(f, datasets.ClassLabel)}
    for number, columns in enumerate(rows, start=1):
        for column, names in classes.items():
            value = columns[column]
            # The hub marks a hidden label with -1.
            columns[column] = names[value] if value is not None and value >= 0 else None
        yield Row(columns, path, f"{name}, row {number}")
