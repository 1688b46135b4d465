"""The names under which ``data.name`` finds rows that are put together here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedllm.data.sources import bbc, chitchat, reasoning
from fedllm.errors import DataError

__all__ = ["SOURCES", "rows"]

Columns = Mapping[str, Any]

SOURCES: Mapping[str, Callable[[str], Iterable[Columns]]] = {
    **{f"bbc-{kind}": make for kind, make in bbc.KINDS.items()},
    "chitchat": chitchat.rows,
    "reasoning": reasoning.rows,
}
"""What makes the rows of each name, given what stands behind the name's colon."""


def rows(name: str) -> Iterable[Columns] | None:
    """Return the rows of a bundled name, such as ``chitchat:16``; ``None`` where it is none.

    Raises:
        DataError: a package is not installed, or what stands behind the colon means nothing.
    """
    source, colon, argument = name.partition(":")
    if source not in SOURCES:
        return None
    if colon and not argument.strip():
        raise DataError(f"data.name = {name!r}: nothing stands behind the colon; leave it out")
    return SOURCES[source](argument)
