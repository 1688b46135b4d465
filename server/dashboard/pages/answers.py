"""The table of one round: what became of every client in every exchange."""

from __future__ import annotations

from typing import Any

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside

from fedllm.runs.records import NodeRound
from fedllm.wording import human_bytes, human_seconds, number
from server.dashboard.actions.operations import Operations
from server.dashboard.pages.table import Table, column

__all__ = ["Answers"]

_COLUMNS = [
    column("node", "Node"),
    column("exchange", "Exchange", wide=True),
    column("status", "Status", "chip", why=True),
    column("loss", "Loss", right=True),
    column("compute", "Compute", right=True),
    column("transfer", "Transfer", right=True, wide=True),
    column("up", "Up", right=True, wide=True),
    column("down", "Down", right=True, wide=True),
    column("memory", "Memory", right=True, wide=True),
    column("norm", "Update norm", right=True, wide=True),
]


class Answers:
    """Chooses a round, by default the last, and shows it."""

    def __init__(self, ops: Operations, name: str) -> None:
        self._ops, self._name = ops, name
        self._newest = True
        self.choice = (
            ui.select([], label="Round", on_change=self._chosen)
            .props("dense outlined options-dense")
            .style("min-width: 7rem")
        )
        self.table = Table(_COLUMNS, "Answers of one round").style("margin-top: 1rem")

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
        stored = self._ops.index.run(self._name)
        rows = await beside(lambda: stored.nodes(round=number_))
        moved = await beside(lambda: stored.traffic(("node", "direction", "exchange"), round=number_))
        bytes_ = {(row["node"], row["direction"], row["exchange"]): row["bytes"] for row in moved}
        self.table.show([_row(index, row, bytes_) for index, row in enumerate(rows)])


def _row(index: int, row: NodeRound, moved: dict[tuple[int, str, str], int]) -> dict[str, Any]:
    # Of an answer that did not count, nothing but its bytes is known.
    compute, transfer, memory = row.compute_seconds, row.transfer_seconds, row.peak_rss_bytes
    told = row.status == "accepted" or compute > 0
    up, down = (moved.get((row.node, way, row.exchange), 0) for way in ("up", "down"))
    return {
        "key": index,
        "node": row.node,
        "exchange": row.exchange + (f", attempt {row.attempt + 1}" if row.attempt else ""),
        "status": row.status,
        "why": row.reason or "",
        "loss": row.loss,
        "loss_text": number(row.loss),
        "compute": compute,
        "compute_text": human_seconds(compute if told else None),
        "transfer": transfer,
        "transfer_text": human_seconds(transfer if told else None),
        "up": up,
        "up_text": human_bytes(up),
        "down": down,
        "down_text": human_bytes(down),
        "memory": memory,
        "memory_text": human_bytes(memory or None),
        "norm": row.update_norm,
        "norm_text": number(row.update_norm),
    }
