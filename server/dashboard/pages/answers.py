"""The table of one round: what became of every client in every exchange."""

from __future__ import annotations

from typing import Any

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside

from fedllm.run_database import NodeRound
from server.dashboard.desk import Desk
from server.dashboard.wording import human_bytes, human_seconds, number

__all__ = ["Answers"]

_LABELS = {
    "node": "Node", "exchange": "Exchange", "status": "Status", "reason": "Reason", "loss": "Loss",
    "compute": "Compute", "transfer": "Transfer", "up": "Up", "down": "Down", "memory": "Peak memory",
    "norm": "Update norm",
}  # fmt: skip
_COLUMNS = [
    {"name": key, "label": label, "field": key, "align": "left", "sortable": True}
    for key, label in _LABELS.items()
]


class Answers:
    """Chooses a round, by default the last, and shows it."""

    def __init__(self, desk: Desk, name: str) -> None:
        self._desk, self._name = desk, name
        self._newest = True
        self.choice = ui.select([], label="Round", on_change=self._chosen).props(
            "dense outlined options-dense"
        )
        self.table = ui.table(rows=[], columns=_COLUMNS, row_key="key", pagination={"rowsPerPage": 50}).props(
            'flat binary-state-sort aria-label="Answers of one round"'
        )
        self.table.style("margin-top: 1rem")
        self.table.add_slot(
            "body-cell-status",
            '<q-td :props="props"><span class="chip" :data-state="props.value">{{ props.value }}</span>'
            "</q-td>",
        )
        self.table.add_slot(
            "body-cell-reason", '<q-td :props="props" class="reason">{{ props.value }}</q-td>'
        )

    def offer(self, rounds: list[int]) -> None:
        """Let these rounds be chosen; whoever looks at the last one moves on to the next."""
        rounds = rounds[::-1]
        if rounds and rounds != self.choice.options:
            follow = self._newest or self.choice.value not in rounds
            self.choice.set_options(rounds, value=rounds[0] if follow else self.choice.value)

    async def _chosen(self) -> None:
        number_ = self.choice.value
        if number_ is None:
            return
        self._newest = number_ == self.choice.options[0]
        stored = self._desk.shelf.run(self._name)
        rows = await beside(lambda: stored.nodes(round=number_))
        moved = await beside(lambda: stored.traffic(("node", "direction", "exchange"), round=number_))
        bytes_ = {(row["node"], row["direction"], row["exchange"]): row["bytes"] for row in moved}
        self.table.rows = [_row(index, row, bytes_) for index, row in enumerate(rows)]


def _row(index: int, row: NodeRound, moved: dict[tuple[int, str, str], int]) -> dict[str, Any]:
    return {
        "key": index,
        "node": row.node,
        "exchange": row.exchange + (f", attempt {row.attempt + 1}" if row.attempt else ""),
        "status": row.status,
        "reason": row.reason or "",
        "loss": number(row.loss),
        "compute": human_seconds(row.compute_seconds),
        "transfer": human_seconds(row.transfer_seconds),
        "up": human_bytes(moved.get((row.node, "up", row.exchange), 0)),
        "down": human_bytes(moved.get((row.node, "down", row.exchange), 0)),
        "memory": human_bytes(row.peak_rss_bytes),
        "norm": number(row.update_norm),
    }
