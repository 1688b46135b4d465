"""The list of runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside
from starlette.requests import Request

from server.dashboard.desk import Desk
from server.dashboard.pages.layout import empty, frame, heading, watch
from server.dashboard.shelf import Overview
from server.dashboard.wording import human_bytes, human_seconds, number

__all__ = ["register", "spark"]

_COLUMNS: list[dict[str, Any]] = [
    {"name": "state", "label": "State", "field": "state", "align": "left", "sortable": True},
    {"name": "name", "label": "Run", "field": "name", "align": "left", "sortable": True},
    {"name": "method", "label": "Method", "field": "method", "align": "left", "sortable": True, "wide": True},
    {"name": "model", "label": "Model", "field": "model", "align": "left", "sortable": True, "wide": True},
    {"name": "round", "label": "Round", "field": "share", "align": "left", "sortable": True},
    {"name": "value", "label": "Quality", "field": "value", "align": "left", "sortable": True},
    {"name": "bytes", "label": "Moved", "field": "bytes", "align": "right", "sortable": True, "wide": True},
    {"name": "left", "label": "Time left", "field": "left", "align": "right", "sortable": True, "wide": True},
]
for _column in _COLUMNS:
    if _column.pop("wide", False):
        _column |= {"classes": "wide", "headerClasses": "wide"}

_SLOTS = {
    "state": '<span class="chip" :data-state="props.row.state">{{ props.row.state }}</span>',
    "name": """<a class="name" :href="'/runs/' + encodeURIComponent(props.row.name)">{{ props.row.name }}</a>
        <div class="reason" v-if="props.row.reason">{{ props.row.reason }}</div>""",
    "round": """{{ props.row.round }} of {{ props.row.rounds }}
        <div class="progress" aria-hidden="true">
        <i :style="{width: 100 * props.row.share + '%'}"></i></div>""",
    "value": """<span :title="props.row.metric">{{ props.row.quality }}</span>
        <svg class="spark wide" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
        <polyline :points="props.row.spark"></polyline></svg>""",
    "bytes": "{{ props.row.moved }}",
    "left": "{{ props.row.remaining }}",
}


def register(desk: Desk) -> None:
    """Serve ``/``."""

    @ui.page("/")
    async def runs_page(request: Request) -> None:
        views = await beside(desk.overviews)
        with frame(request, "Runs") as who:
            with ui.element("div").classes("row apart"):
                heading("Runs")
                counted = ui.label(_counted(views)).classes("soft").props('role="status"')
            if not views:
                empty(
                    "No runs yet",
                    f"Start one under New run, or on the command line: "
                    f"fedllm simulate --out {desk.root / 'first'}",
                )

                def look_for_first() -> None:
                    if desk.overviews():
                        ui.navigate.reload()

                watch(desk, who, look_for_first)
                return
            table = _table(views)

        async def look() -> None:
            found = await beside(desk.overviews)
            rows = [_row(view) for view in found]
            if rows != table.rows:
                table.rows = rows
                counted.text = _counted(found)

        watch(desk, who, look)


def _table(views: Sequence[Overview]) -> ui.table:
    with ui.element("div").classes("row"):
        search = ui.input("Filter by name, method, model").props("dense outlined clearable")
        states = ["all states", *sorted({view.state for view in views})]
        state = ui.select(states, value="all states", label="State").props("dense outlined")
    table = ui.table(
        rows=[_row(view) for view in views],
        columns=_COLUMNS,
        row_key="name",
        pagination={"rowsPerPage": 25},
    ).props('flat binary-state-sort aria-label="Runs"')
    table.style("margin-top: 1rem")
    for name, content in _SLOTS.items():
        table.add_slot(f"body-cell-{name}", f'<q-td :props="props">{content}</q-td>')
    # Quasar hands the filter to this function for every row.
    # A function that Quasar calls in the browser, with what narrow() wrote.
    matches = (
        "(!state || row.state === state) && (!word || "
        "(row.name + ' ' + row.method + ' ' + row.model).toLowerCase().includes(word))"
    )
    table.props[":filter-method"] = (
        "(rows, terms) => { const [word, state] = JSON.parse(terms);"
        f" return rows.filter(row => {matches}) }}"
    )

    def narrow() -> None:
        wanted = "" if state.value == "all states" else state.value
        table.filter = _terms(search.value or "", wanted)

    search.on_value_change(narrow)
    state.on_value_change(narrow)
    return table


def _terms(word: str, state: str) -> str | None:
    return json.dumps([word.lower(), state]) if word or state else None


def _counted(views: Sequence[Overview]) -> str:
    counts = Counter(view.state for view in views)
    return ", ".join(f"{count} {state}" for state, count in counts.most_common()) or "none"


def _row(view: Overview) -> dict[str, Any]:
    moved = view.bytes_up + view.bytes_down
    return {
        "name": view.name,
        "state": view.state,
        "reason": view.reason,
        "method": view.method,
        "model": view.model,
        "round": view.round,
        "rounds": view.rounds or "?",
        "share": view.round / view.rounds if view.rounds else 0.0,
        "metric": view.metric,
        "value": view.value,
        "quality": number(view.value, 3),
        "spark": spark(view.series),
        "bytes": moved,
        "moved": human_bytes(moved),
        "left": view.seconds_left,
        "remaining": human_seconds(view.seconds_left),
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
