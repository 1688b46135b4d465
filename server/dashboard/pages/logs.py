"""What a run has said so far: its events, what its server process printed, what its nodes logged."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside

from fedllm.runs.records import Event, NodeLog
from server.dashboard.actions.operations import Operations
from server.dashboard.pages.layout import heading

__all__ = ["Logs", "audit_line"]

_LINES = 500
_NOT_FROM_HERE = "Nothing: it was started on a command line, or has not printed anything yet."
_NO_LINES = "Nothing: only nodes of a federation send lines of their log, with their answers."


class Logs:
    """Three logs, newest lines last, followed while the run goes on."""

    def __init__(self, ops: Operations, name: str) -> None:
        self._ops, self._name = ops, name
        self._last_event, self._last_node_log = 0, 0
        self.events = _log("What happened")
        self.server = _log("What the server's process printed")
        self.nodes = _log("What the nodes logged")
        self.server.text = _NOT_FROM_HERE
        self.nodes.text = _NO_LINES

    async def look(self) -> None:
        """Show what is new in the run's store."""
        stored = self._ops.index.run(self._name)
        happened = await beside(stored.events, self._last_event, 10_000)
        if happened:
            self._last_event = happened[-1].id
            _append(self.events, [_event(event) for event in happened])
        logged = await beside(stored.node_logs, self._last_node_log, limit=10_000)
        if logged:
            self._last_node_log = logged[-1].id
            _append(self.nodes, [line for row in logged for line in _node_log(row)])

    def look_at_server(self) -> None:
        """Show what the server's process has printed since."""
        said = self._ops.launcher.log(self._name)
        if said and said != self.server.text:
            self.server.text = said


def _log(title: str) -> ui.label:
    heading(title, 2)
    return ui.label().classes("log").props(f'role="log" tabindex="0" aria-label="{title}"')


def _append(log: ui.label, lines: list[str]) -> None:
    held = [] if log.text == _NO_LINES else log.text.splitlines()
    log.text = "\n".join([*held, *lines][-_LINES:])


def _event(event: Event) -> str:
    return f"{clock(event.at)}  {event.kind:<10}  {event.message}"


def _node_log(row: NodeLog) -> list[str]:
    return [f"node {row.node}  {line}" for line in row.lines.splitlines()]


def audit_line(row: Mapping[str, Any]) -> str:
    """Write one thing that was done; whoever failed to log in chose the name, so it stays on its line."""
    parts = (clock(row["at"]), row["who"], row["action"], row.get("run", ""), row["detail"])
    text = "  ".join(str(part) for part in parts if part)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def clock(at: float) -> str:
    """Write a Unix time as the server's clock shows it."""
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
