"""The table of a run's clients, with the levers for each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from nicegui import events

from fedllm.measures import leading
from fedllm.runs.totals import NodeTotal
from fedllm.wording import ago, human_bytes, human_seconds, number
from server.dashboard.actions.operations import Operations
from server.dashboard.door.access import Principal
from server.dashboard.pages.layout import act, sure
from server.dashboard.pages.table import Table, column

__all__ = ["NodeTable"]


_COLUMNS = [
    column("key", "Node"),
    column("state", "State", "chip", why=True),
    column("lever", "Action", "lever"),
    column("seen", "Last seen", right=True, wide=True),
    column("examples", "Texts", right=True, wide=True),
    column("loss", "Loss", right=True, wide=True),
    column("score", "Own score", right=True, wide=True),
    column("compute", "Compute", right=True),
    column("transfer", "Transfer", right=True, wide=True),
    column("moved", "Moved", right=True, wide=True),
    column("memory", "Memory", right=True, wide=True),
    column("answers", "Answers", right=True, wide=True),
    column("device", "Device", "device", wide=True),
]


class NodeTable:
    """A table of clients that can be shown anew."""

    def __init__(self, ops: Operations, who: Principal, run: str, leave_out: Collection[str] = ()) -> None:
        self._ops, self._who, self._run = ops, who, run
        config = ops.index.run(run).config
        self._metric = config.metric
        if not config.evaluation.clients:
            leave_out = {*leave_out, "score"}
        self.table = Table([one for one in _COLUMNS if one["name"] not in leave_out], "Nodes")
        self.table.on_lever(self._act)

    def show(self, nodes: Sequence[NodeTotal], *, live: bool) -> None:
        """Show these clients; those of a live run can be quarantined and released, others forgotten."""
        metric = leading({name for node in nodes for name in node.scores}, self._metric)
        self.table.show([self._row(node, live, metric) for node in nodes])

    def _row(self, node: NodeTotal, live: bool, metric: str) -> dict[str, Any]:
        lost = node.late + node.failed + node.rejected
        waiting = "release" if node.state == "quarantined" else "quarantine"
        usable = self._who.role == "operator" and (live or node.known)
        return {
            "key": node.node,
            "state": node.state,
            "why": node.reason if node.state in ("failing", "late") else "",
            "lever": (waiting if live else "forget") if usable else "",
            "seen": node.last_seen_at or 0.0,
            "seen_text": ago(node.last_seen_at),
            "examples": node.examples,
            "examples_text": str(node.examples) if node.examples else "-",
            "loss": node.loss,
            "loss_text": number(node.loss),
            "score": node.scores.get(metric),
            "score_text": f"{metric} {number(node.scores[metric])}" if metric in node.scores else "-",
            "compute": node.compute_seconds,
            "compute_text": human_seconds(node.compute_seconds),
            "transfer": node.transfer_seconds,
            "transfer_text": human_seconds(node.transfer_seconds),
            "moved": node.bytes_up + node.bytes_down,
            "moved_text": human_bytes(node.bytes_up + node.bytes_down),
            "memory": node.peak_rss_bytes,
            "memory_text": human_bytes(node.peak_rss_bytes or None),
            "answers": node.accepted,
            "answers_text": str(node.accepted) + (f" ({lost} lost)" if lost else ""),
            "device": _device(node.device),
        }

    async def _act(self, event: events.GenericEventArguments) -> None:
        node, kind = int(event.args["node"]), str(event.args["lever"])
        if kind == "forget":
            question = f"Delete what {self._run} keeps about node {node}? Its bytes stay in the totals."
            if not await sure(question, "Delete", "Keep"):
                return
            said = f"what {self._run} kept about node {node} is deleted"
            await act(lambda: self._ops.forget(self._who, self._run, node), said)
        else:
            said = f"{kind} node {node}: takes effect before the next round"
            await act(lambda: self._ops.command(self._who, self._run, kind, node), said)


def _device(device: dict[str, Any]) -> str:
    parts = [f"fedllm {device['fedllm']}"] if device.get("fedllm") else []
    parts += [str(device["platform"])] if device.get("platform") else []
    if isinstance(device.get("cores"), int | float):
        parts.append(f"{device['cores']:.0f} threads")
    if isinstance(device.get("memory_bytes"), int | float):
        parts.append(human_bytes(device["memory_bytes"]))
    parts += [f"{name} {device[name]}" for name in ("python", "torch") if device.get(name)]
    return ", ".join(parts)
