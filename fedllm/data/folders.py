"""Rows, and folders that hold one text a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.data.decoding import decoded
from fedllm.errors import DataError

__all__ = ["Row", "class_folders", "require_file", "visible"]

_HIDDEN = (".", "~$", "__MACOSX", "__pycache__")
"""Beginnings of names that editors, notebooks and file systems give to what is theirs."""


@dataclass(frozen=True)
class Row:
    """One row as it was found: its columns, the file it came from, and where (for messages)."""

    columns: Mapping[str, Any]
    file: str
    where: str
    supposed: frozenset[str] = field(default=frozenset(), repr=False)
    """Those of the columns that :meth:`supposing` added."""

    def supposing(self, columns: Mapping[str, Any]) -> Row:
        """Return the row as if it had these columns too: no message names them among those that it has."""
        added = self.supposed | (columns.keys() - self.columns.keys())
        return Row({**self.columns, **columns}, self.file, self.where, added)

    @property
    def found(self) -> list[str]:
        """The names of the columns that the row came with."""
        return [name for name in self.columns if name not in self.supposed]


def visible(folder: Path) -> list[Path]:
    """Return what a folder holds, by name, without what is hidden or an editor's, a notebook's or macOS's.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        return sorted(item for item in folder.iterdir() if not item.name.startswith(_HIDDEN))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error


def require_file(item: Path) -> Path:
    """Refuse what is called like data and is none: leaving it out would train on a part of the texts."""
    if item.is_file():
        return item
    what = "a link to nothing" if item.is_symlink() else "a folder" if item.is_dir() else "no file"
    raise DataError(f"{item} is named like data but is {what}; rename or remove it")


def class_folders(root: Path) -> Iterator[Row]:
    """Yield the texts of one folder per class, one .txt file each; the columns are named text and label."""
    for folder in filter(Path.is_dir, visible(root)):
        for file in visible(folder):
            if file.suffix.lower() == ".txt":
                yield Row({"text": decoded(require_file(file)), "label": folder.name}, folder.name, str(file))
