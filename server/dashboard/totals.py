"""A run's clients, each summed up over all rounds, from the run's tables."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm import run_database
from fedllm.durable import disk_errors

__all__ = ["NodeTotal", "node_totals"]


@dataclass(frozen=True, kw_only=True)
class NodeTotal:
    """One client over a whole run; seconds are means over its accepted answers.

    Attributes:
        node: its number in the federation.
        state: ``ok``, ``failing`` (its last answer did not count) or ``quarantined``.
        last_round: when it was last asked; -1 for never.
        last_seen_at: Unix time of the end of the last round that counted an answer of it.
        reason: of its last answer that did not count.
        device: what it told about itself when it joined.
    """

    node: int
    state: str = "ok"
    last_round: int = -1
    last_seen_at: float | None = None
    accepted: int = 0
    late: int = 0
    failed: int = 0
    rejected: int = 0
    examples: int = 0
    loss: float | None = None
    compute_seconds: float | None = None
    transfer_seconds: float | None = None
    peak_rss_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    reason: str = ""
    device: dict[str, Any] = field(default_factory=dict)


_TOTALS = """
SELECT node, MAX(round) AS last_round,
       SUM(status = 'accepted') AS accepted, SUM(status = 'late') AS late, SUM(status = 'failed') AS failed,
       SUM(status = 'rejected') AS rejected, MAX(examples) AS examples, MAX(peak_rss_bytes) AS peak_rss_bytes,
       AVG(CASE WHEN status = 'accepted' THEN compute_seconds END) AS compute_seconds,
       AVG(CASE WHEN status = 'accepted' THEN transfer_seconds END) AS transfer_seconds,
       MAX(CASE WHEN status = 'accepted' THEN round END) AS last_accepted
FROM node_rounds GROUP BY node
"""
# SQLite's bare columns: of the row that has the maximum.
_LAST = "SELECT node, status, MAX(rowid) FROM node_rounds WHERE status != 'unused' GROUP BY node"
_LAST_LOSS = "SELECT node, loss, MAX(rowid) FROM node_rounds WHERE loss IS NOT NULL GROUP BY node"
_LAST_REASON = """
SELECT node, reason, MAX(rowid) FROM node_rounds WHERE status IN ('late', 'failed', 'rejected') GROUP BY node
"""
_BYTES = "SELECT node, direction, SUM(bytes) AS bytes FROM ledger GROUP BY node, direction"
_TOLD = "SELECT kind, fields FROM events WHERE kind IN ('joined', 'quarantine', 'release') ORDER BY id"


def node_totals(folder: Path) -> list[NodeTotal]:
    """Sum up the clients of a run, ascending."""
    with disk_errors(folder), run_database.connect(folder) as connection:

        def rows(query: str) -> list[Any]:
            return connection.execute(query).fetchall()

        totals = {row["node"]: dict(row) for row in rows(_TOTALS)}
        last = {row["node"]: row["status"] for row in rows(_LAST)}
        losses = {row["node"]: row["loss"] for row in rows(_LAST_LOSS)}
        reasons = {row["node"]: row["reason"] or "" for row in rows(_LAST_REASON)}
        moved = {(row["node"], row["direction"]): row["bytes"] for row in rows(_BYTES)}
        told = [(row["kind"], json.loads(row["fields"])) for row in rows(_TOLD)]
        ends = {row["round"]: row["finished_at"] for row in rows("SELECT round, finished_at FROM rounds")}
    devices, quarantined = _devices(told)
    found = []
    for node in sorted({*totals, *devices, *(node for node, _ in moved)} - {-1}):
        total = totals.get(node, {})
        total.pop("node", None)
        seen = ends.get(total.pop("last_accepted", None))
        state = "quarantined" if node in quarantined else "ok"
        if state == "ok" and last.get(node, "accepted") != "accepted":
            state = "failing"
        found.append(
            NodeTotal(
                node=node,
                state=state,
                last_seen_at=seen,
                loss=losses.get(node),
                bytes_up=moved.get((node, "up"), 0),
                bytes_down=moved.get((node, "down"), 0),
                reason=reasons.get(node, ""),
                device=devices.get(node, {}),
                **total,
            )
        )
    return found


def _devices(told: list[tuple[str, dict[str, Any]]]) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Return what clients told about themselves when they last joined, and who is set aside."""
    devices: dict[int, dict[str, Any]] = {}
    quarantined: set[int] = set()
    for kind, fields in told:
        node = fields.get("node")
        if not isinstance(node, int):
            continue
        if kind == "joined":
            device = fields.get("device")
            devices[node] = device if isinstance(device, dict) else {}
        elif kind == "quarantine":
            quarantined.add(node)
        else:
            quarantined.discard(node)
    return devices, quarantined
