"""What a row holds in the columns that a run names, or one sentence with file and line."""

from __future__ import annotations

import math
from typing import Any

from fedllm.data.labels import Label, blank, plain, require_whole
from fedllm.data.reading import Row
from fedllm.data.shapes.columns import column_names
from fedllm.errors import DataError

__all__ = ["belonging", "column", "identity", "label", "text"]


def column(row: Row, name: str, key: str) -> Any:
    """Return what stands in a column.

    Args:
        row: of the data.
        name: the column's.
        key: the setting that names it, for messages.

    Raises:
        DataError: there is no such column; lists those that there are.
    """
    if name not in row.columns:
        raise DataError(
            f"{row.where}: there is no column {name!r} ({key}); the columns are {column_names(row)}"
        )
    return row.columns[name]


def text(row: Row, name: str, key: str = "data.text") -> str | None:
    """Return a row's text, or nothing where there is none to read.

    Raises:
        DataError: the column is missing or holds something else.
    """
    value = column(row, name, key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{row.where}: column {name!r} is not text but {type(value).__name__} {str(value)[:40]}"
        )
    try:
        require_whole(value)
    except ValueError as error:
        raise DataError(f"{row.where}: column {name!r} holds {error}; mend or drop it") from None
    return None if blank(value) else value


def label(row: Row, name: str) -> Label:
    """Return a row's class.

    Raises:
        DataError: the column is missing, empty, or holds what is no class.
    """
    return _plain(row, name, "data.label", "hold a class, a text or a whole number")


def identity(row: Row, name: str) -> str:
    """Return whose a row is.

    Raises:
        DataError: the column is missing or empty.
    """
    return str(_plain(row, name, "data.by", "name whose text it is"))


def belonging(row: Row, name: str) -> str:
    """Return what a row belongs to.

    Raises:
        DataError: the column is missing or empty.
    """
    return str(_plain(row, name, "data.group", "say what the row belongs to"))


def _plain(row: Row, name: str, key: str, wanted: str) -> Label:
    value = column(row, name, key)
    try:
        found = plain(value)
        problem = "empty"
    except ValueError as error:
        found, problem = None, str(error)
    if found is None:
        raise DataError(f"{row.where}: column {name!r} ({key}) must {wanted}, not {problem}")
    return found
