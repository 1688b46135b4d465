"""A sortable table whose cells stay in place while rows change: NiceGUI's own makes slots anew each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from nicegui import events
from nicegui.element import Element

__all__ = ["Table", "column"]

Row = dict[str, Any]
Kind = Literal["", "chip", "link", "lever", "progress", "curve", "device", "reason"]


def column(
    name: str, label: str, kind: Kind = "", *, right: bool = False, wide: bool = False, why: bool = False
) -> dict[str, Any]:
    """Describe a column.

    Args:
        name: key of a row by which it sorts; ``NAME_text`` is what is shown instead, if there is one.
        label: its heading.
        kind: how its cells look; see ``table.js``.
        right: aligned to the right, as numbers are.
        wide: left out on a phone.
        why: the row's ``why`` stands below.
    """
    hidden = {"classes": "wide", "headerClasses": "wide"} if wide else {}
    shown = {"align": "right" if right else "left", "sortable": kind != "lever", "kind": kind, "why": why}
    return {"name": name, "field": name, "label": label, **shown, **hidden}


class Table(Element, component="table.js"):
    """Shows rows; each has a ``key``, and what its columns name.

    Sorted, narrowed and cut into pages here: the browser is sent one page, however many rows there are.

    Args:
        columns: made by :func:`column`.
        label: for screen readers.
        size: rows on a page.
    """

    def __init__(self, columns: Sequence[dict[str, Any]], label: str, size: int = 50) -> None:
        super().__init__()
        self._rows: list[Row] = []
        self._size, self._page = size, 1
        self._sort_by, self._descending = "", False
        self._word, self._state = "", ""
        self._props |= {"rows": [], "total": 0, "page": 1, "columns": list(columns)}
        self._props |= {"label": label, "size": size}
        self.on("look", self._look)

    def show(self, rows: list[Row]) -> None:
        """Show these rows; nothing is sent where nothing that is in sight has changed."""
        self._rows = rows
        self._send()

    def narrow(self, word: str, state: str) -> None:
        """Show only rows whose ``search`` holds a word and whose ``state`` is this one; empty means any."""
        self._word, self._state, self._page = word.lower(), state, 1
        self._send()

    def _look(self, event: events.GenericEventArguments) -> None:
        """Turn to the page, and sort by the column, that the browser asks for."""
        self._page = max(1, int(event.args["page"]))
        self._sort_by, self._descending = str(event.args["sortBy"] or ""), bool(event.args["descending"])
        self._send()

    def _send(self) -> None:
        rows = [
            row
            for row in self._rows
            if (not self._state or row["state"] == self._state)
            and (not self._word or self._word in row["search"])
        ]
        if self._sort_by:
            # What has no value comes last, whichever way the others are sorted.
            held = [row for row in rows if row.get(self._sort_by) is not None]
            held.sort(key=lambda row: row[self._sort_by], reverse=self._descending)
            rows = held + [row for row in rows if row.get(self._sort_by) is None]
        self._page = min(self._page, max(1, math.ceil(len(rows) / self._size)))
        first = (self._page - 1) * self._size
        shown = {"rows": rows[first : first + self._size], "total": len(rows), "page": self._page}
        if any(self._props[name] != value for name, value in shown.items()):
            self._props |= shown
            self.update()

    def on_lever(self, act: Callable[[events.GenericEventArguments], Any]) -> None:
        """Call ``act`` with ``node`` and ``lever`` when a row's lever is pulled."""
        self.on("lever", act)
