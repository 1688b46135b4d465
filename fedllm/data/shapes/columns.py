"""Columns of a row: text, lists and objects, and what to say where a row has another thing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.data.labels import blank, require_whole
from fedllm.data.reading import Row
from fedllm.errors import DataError

__all__ = [
    "AS_THEY_ARE",
    "Names",
    "absent",
    "as_text",
    "column_names",
    "has",
    "shown",
    "structured",
    "text_column",
]

Names = Mapping[str, str]
"""What columns are called that have another name than the task's own."""

AS_THEY_ARE: Names = {}


def named(row: Row, key: str, names: Names) -> str:
    """Return what a row calls a column that it must have.

    Raises:
        DataError: it has none; names those it has.
    """
    name = names.get(key, key)
    if name not in row.columns:
        raise DataError(f"{row.where}: there is no column {name!r}; the columns are {column_names(row)}")
    return name


def structured(row: Row, column: str, *kinds: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """Return the list or the object of a column, also where it stands there as JSON text.

    Args:
        row: the row.
        column: what it calls the column.
        kinds: what is wanted there, ``list``, ``dict`` or both.

    >>> structured(Row({"tags": '["O", "B-city"]'}, "a.csv", "a.csv, line 2"), "tags", list)
    ['O', 'B-city']

    Raises:
        DataError: another thing is there.
    """
    value = row.columns[column]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{row.where}: column {column!r} is not valid JSON ({error})") from None
    if not isinstance(value, kinds):
        wanted = " or ".join({list: "a list", dict: "an object"}[kind] for kind in kinds)
        raise DataError(f"{row.where}: column {column!r} must hold {wanted}, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value's type and beginning, for a message."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return f"{type(value).__name__} {text[:40]}".rstrip()


def absent(value: Any) -> bool:
    """Whether a column holds nothing: no value, no number, or a text with nothing to see."""
    if isinstance(value, str):
        return blank(value)
    return value is None or value == [] or (isinstance(value, float) and value != value)


def as_text(row: Row, value: Any, what: str) -> str:
    """Return a text, empty where there is none."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {what} must be text, not {shown(value)}")
    try:
        require_whole(value)
    except ValueError as error:
        raise DataError(f"{row.where}: {what} holds {error}; mend or drop it") from None
    return value


def text_column(row: Row, key: str, names: Names) -> str:
    """Return the text of a column that must be there."""
    name = named(row, key, names)
    return as_text(row, row.columns[name], f"column {name!r}")


def column_names(row: Row) -> str:
    """Name a row's columns for a message: a few, not their whole length, and nothing that cannot be sent."""
    names = [name.encode("utf-8", "backslashreplace").decode()[:40] for name in row.found]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"


def has(row: Row, keys: Sequence[str], names: Names, *, filled: bool = False) -> bool:
    """Whether a row has all of some columns.

    Args:
        row: the row.
        keys: the task's names of the columns.
        names: what they are called where they have another name.
        filled: whether a column without a value counts as missing.
    """
    found = [names.get(key, key) for key in keys]
    return all(name in row.columns and not (filled and row.columns[name] is None) for name in found)
