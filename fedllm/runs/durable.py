"""Writes that either happen wholly or not at all, whatever kills the process between two instructions."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import StoreError

__all__ = [
    "append_line",
    "disk_errors",
    "finite",
    "replace_file",
    "sync_folder",
    "to_json",
    "write_private",
]

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's and SQLite's refusals to write into one sentence each.

    Raises:
        StoreError: says that the disk is full and what to do about it, or names the file and the reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreError(_full(folder)) from error
        raise StoreError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise StoreError(_full(folder)) from error
        raise StoreError(f"cannot use {folder / 'run.db'}: {error}") from error


def _full(folder: Path) -> str:
    run = folder.parent if folder.name == "checkpoints" else folder
    federation = run.parent.parent
    if run == folder and not (run / "run.db").exists():
        # A device's state: the server asks again of itself.
        return f"disk full at {folder}: free space"
    if (federation / "federation.toml").exists():
        return f"disk full at {folder}: free space, then fedllm run --resume {run.name} --server {federation}"
    return f"disk full at {folder}: free space, then fedllm resume {run}"


def sync_folder(folder: Path) -> None:
    """Make renames and creations within a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read; there is no moment at which others can."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def replace_file(path: Path, content: bytes | str, *, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old content or the new, never a part; with this mode."""
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path.parent):
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write."""
    with disk_errors(path.parent), path.open("ab") as file:
        file.write(f"{line}\n".encode())


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None at any depth, since JSON has neither.

    >>> finite({"loss": float("nan"), "parts": [1.0, float("inf")]})
    {'loss': None, 'parts': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Write strict JSON."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)
