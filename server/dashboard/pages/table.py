"""A sortable table whose cells stay in place while rows change: NiceGUI's own makes slots anew each time."""

from __future__ import annotations

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

    Args:
        columns: made by :func:`column`.
        label: for screen readers.
        size: rows on a page.
    """

    def __init__(self, columns: Sequence[dict[str, Any]], label: str, size: int = 50) -> None:
        super().__init__()
        self._props |= {"rows": [], "columns": list(columns), "label": label, "size": size}

    @property
    def rows(self) -> list[Row]:
        """What is shown."""
        rows: list[Row] = self._props["rows"]
        return rows

    def show(self, rows: list[Row]) -> None:
        """Show these rows; nothing is sent where nothing has changed."""
        if rows != self.rows:
            self._props["rows"] = rows
            self.update()

    def narrow(self, word: str, state: str) -> None:
        """Show only rows whose ``search`` holds a word and whose ``state`` is this one; empty means any."""
        self._props |= {"search": word, "state": state}
        self.update()

    def on_lever(self, act: Callable[[events.GenericEventArguments], Any]) -> None:
        """Call ``act`` with ``node`` and ``lever`` when a row's lever is pulled."""
        self.on("lever", act)
