"""The table of a run's clients, with the levers for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nicegui import events, ui

from server.dashboard.access import Principal
from server.dashboard.desk import Desk
from server.dashboard.pages.layout import act
from server.dashboard.shelf import NodeTotal
from server.dashboard.wording import ago, human_bytes, human_seconds, number

__all__ = ["NodeTable"]


def _column(
    name: str, label: str, field: str = "", *, right: bool = True, wide: bool = False
) -> dict[str, Any]:
    hidden = {"classes": "wide", "headerClasses": "wide"} if wide else {}
    align = "right" if right else "left"
    return {"name": name, "label": label, "field": field or name, "align": align, "sortable": True, **hidden}


_COLUMNS = [
    _column("node", "Node", right=False),
    _column("state", "State", right=False),
    _column("seen", "Last seen", "seen_at", wide=True),
    _column("examples", "Texts", wide=True),
    _column("loss", "Loss"),
    _column("compute", "Compute", "compute_seconds"),
    _column("transfer", "Transfer", "transfer_seconds", wide=True),
    _column("moved", "Moved", "bytes"),
    _column("memory", "Peak memory", "peak_rss_bytes", wide=True),
    _column("answers", "Accepted", "accepted", wide=True),
    _column("lost", "Lost"),
    _column("device", "Device", right=False, wide=True),
    {"name": "levers", "label": "", "field": "node", "align": "right"},
]
_SLOTS = {
    "state": """<span class="chip" :data-state="props.row.state">{{ props.row.state }}</span>
        <div class="reason" v-if="props.row.reason">{{ props.row.reason }}</div>""",
    "seen": "{{ props.row.seen }}",
    "loss": "{{ props.row.loss_text }}",
    "compute": "{{ props.row.compute }}",
    "transfer": "{{ props.row.transfer }}",
    "moved": '<span :title="props.row.ways">{{ props.row.moved }}</span>',
    "memory": "{{ props.row.memory }}",
    "device": '<span class="soft">{{ props.row.device }}</span>',
    "levers": """<q-btn v-if="props.row.lever" flat dense no-caps size="sm" :label="props.row.lever"
        :aria-label="props.row.lever + ' node ' + props.row.node"
        @click="() => $parent.$emit('lever', props.row)"></q-btn>""",
}


class NodeTable:
    """A table of clients that can be shown anew."""

    def __init__(self, desk: Desk, who: Principal, run: str) -> None:
        self._desk, self._who, self._run = desk, who, run
        self.table = ui.table(
            rows=[], columns=_COLUMNS, row_key="node", pagination={"rowsPerPage": 50, "sortBy": "node"}
        ).props('flat binary-state-sort aria-label="Nodes"')
        for name, content in _SLOTS.items():
            self.table.add_slot(f"body-cell-{name}", f'<q-td :props="props">{content}</q-td>')
        self.table.on("lever", self._act)

    def show(self, nodes: Sequence[NodeTotal], *, live: bool) -> None:
        """Show these clients; those of a live run can be quarantined and released, others forgotten."""
        rows = [self._row(node, live) for node in nodes]
        if rows != self.table.rows:
            self.table.rows = rows

    def _row(self, node: NodeTotal, live: bool) -> dict[str, Any]:
        waiting = "release" if node.state == "quarantined" else "quarantine"
        usable = self._who.role == "operator"
        return {
            "node": node.node,
            "state": node.state,
            "reason": node.reason if node.state == "failing" else "",
            "seen_at": node.last_seen_at or 0.0,
            "seen": ago(node.last_seen_at),
            "examples": node.examples,
            "loss": node.loss,
            "loss_text": number(node.loss),
            "compute_seconds": node.compute_seconds,
            "compute": human_seconds(node.compute_seconds),
            "transfer_seconds": node.transfer_seconds,
            "transfer": human_seconds(node.transfer_seconds),
            "bytes": node.bytes_up + node.bytes_down,
            "moved": human_bytes(node.bytes_up + node.bytes_down),
            "ways": f"up {human_bytes(node.bytes_up)}, down {human_bytes(node.bytes_down)}",
            "peak_rss_bytes": node.peak_rss_bytes,
            "memory": human_bytes(node.peak_rss_bytes),
            "accepted": node.accepted,
            "lost": node.late + node.failed + node.rejected,
            "device": _device(node.device),
            "lever": (waiting if live else "forget") if usable else "",
        }

    async def _act(self, event: events.GenericEventArguments) -> None:
        node, kind = int(event.args["node"]), str(event.args["lever"])
        if kind == "forget":
            said = f"what {self._run} kept about node {node} is deleted"
            await act(lambda: self._desk.forget(self._who, self._run, node), said)
        else:
            said = f"{kind} node {node}: takes effect before the next round"
            await act(lambda: self._desk.command(self._who, self._run, kind, node), said)


def _device(device: dict[str, Any]) -> str:
    parts = [str(device["platform"])] if device.get("platform") else []
    if isinstance(device.get("cores"), int | float):
        parts.append(f"{device['cores']:.0f} cores")
    if isinstance(device.get("memory_bytes"), int | float):
        parts.append(human_bytes(device["memory_bytes"]))
    parts += [f"{name} {device[name]}" for name in ("python", "torch") if device.get(name)]
    return ", ".join(parts)
