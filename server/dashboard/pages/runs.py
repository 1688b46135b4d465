"""The list of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside
from starlette.requests import Request

from fedllm.wording import human_bytes, human_seconds, number
from server.dashboard.actions.operations import Operations
from server.dashboard.pages.layout import empty, frame, heading, page, watch
from server.dashboard.pages.table import Table, column
from server.dashboard.reading.runs import Overview

__all__ = ["register", "spark"]

_COLUMNS = [
    column("state", "State", "chip", wide=True),
    column("name", "Run", "link", why=True),
    column("method", "Method", wide=True),
    column("model", "Model", wide=True),
    column("share", "Round", "progress"),
    column("value", "Quality", "curve"),
    column("bytes", "Moved", right=True, wide=True),
    column("left", "Time left", right=True, wide=True),
]

_STATES = (
    "all states",
    "running",
    "paused",
    "starting",
    "finished",
    "failed",
    "stopped",
    "interrupted",
    "unreadable",
)


def register(ops: Operations) -> None:
    """Serve ``/``."""

    @page("/")
    async def runs_page(request: Request) -> None:
        views = await beside(ops.overviews)
        with frame(request, "Runs") as who:
            with ui.element("div").classes("row apart"):
                heading("Runs")
                counted = ui.label(_counted(views)).classes("soft").props('role="status"')
            if not views:
                empty(
                    "No runs yet",
                    f"Start one under New run, or on the command line: "
                    f"fedllm simulate --out {ops.root / 'first'}",
                )

                def look_for_first() -> None:
                    if ops.overviews():
                        ui.navigate.reload()

                watch(ops, who, look_for_first)
                return
            table = _table(views)

        async def look() -> None:
            found = await beside(ops.overviews)
            table.show([_row(view) for view in found])
            counted.text = _counted(found)

        watch(ops, who, look)


def _table(views: Sequence[Overview]) -> Table:
    with ui.element("div").classes("row").style("margin-bottom: 1rem"):
        search = ui.input("Filter by name, method, model").props("dense outlined clearable")
        search.style("flex: 0 1 20rem")
        state = ui.select(list(_STATES), value=_STATES[0], label="State").props("dense outlined")
        state.style("min-width: 9rem")
    table = Table(_COLUMNS, "Runs", size=25)
    table.show([_row(view) for view in views])

    def narrow() -> None:
        table.narrow(search.value or "", "" if state.value == _STATES[0] else state.value)

    search.on_value_change(narrow)
    state.on_value_change(narrow)
    return table


def _counted(views: Sequence[Overview]) -> str:
    counts = Counter(view.state for view in views)
    return ", ".join(f"{count} {state}" for state, count in counts.most_common()) or "none"


def _row(view: Overview) -> dict[str, Any]:
    moved = view.bytes_up + view.bytes_down
    return {
        "key": view.name,
        "href": f"/runs/{quote(view.name, safe='')}",
        "search": f"{view.name} {view.method} {view.model}".lower(),
        "name": view.name,
        "state": view.state,
        "why": view.reason,
        "method": view.method,
        "model": view.model,
        # Of a folder, its last part says enough.
        "model_text": view.model.rstrip("/").rpartition("/")[2] if view.model.startswith("/") else view.model,
        "share": view.round / view.rounds if view.rounds else 0.0,
        "share_text": f"{view.round} of {view.rounds}" if view.rounds else "-",
        "value": view.value,
        "value_text": number(view.value, 3),
        "spark": spark(view.series),
        "bytes": moved,
        "bytes_text": human_bytes(moved),
        "left": view.seconds_left,
        "left_text": human_seconds(view.seconds_left),
    }


def spark(series: Sequence[float], points: int = 40) -> str:
    """Return an SVG polyline's points in a box of 100 x 24, at most ``points`` of them.

    >>> spark([0.0, 0.5, 1.0])
    '0,22 50,12 100,2'
    >>> spark([1.0])
    ''
    """
    if len(series) < 2:
        return ""
    every = max(1, len(series) // points)
    shown = [*series[:-1:every], series[-1]]
    low, high = min(shown), max(shown)
    scale = 20 / (high - low) if high > low else 0.0
    step = 100 / (len(shown) - 1)
    return " ".join(
        f"{index * step:.4g},{22 - (value - low) * scale:.4g}" for index, value in enumerate(shown)
    )
