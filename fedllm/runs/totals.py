"""What a run's tables add up to: what a list of runs tells of it, and its clients over all rounds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.runs import database
from fedllm.runs.database import select
from fedllm.runs.durable import disk_errors
from fedllm.runs.ledger import NOBODY
from fedllm.runs.reader import Run
from fedllm.runs.records import NodeRound
from fedllm.runs.summary import own_scores

__all__ = ["Glance", "NodeTotal", "RoundGlance", "glance", "node_totals", "records_mark"]


class RoundGlance(NamedTuple):
    """A committed round as far as a list of runs needs it."""

    round: int
    seconds: float
    metrics: dict[str, float]
    finished_at: float


@dataclass(frozen=True, kw_only=True)
class Glance:
    """A run in a few facts, all of one moment.

    Attributes:
        config: as JSON.
        status: as the run's own process wrote it last; it may have been killed since.
        phase: what it is doing; see :attr:`fedllm.runs.reader.Run.phase`.
        failure: why it failed; empty unless it did.
        rounds: committed, ascending.
        pending: kinds of the commands that it has not taken yet, oldest first.
    """

    config: str
    status: str
    phase: dict[str, Any]
    failure: str
    rounds: list[RoundGlance]
    pending: list[str]


def glance(folder: Path) -> Glance:
    """Read what a list of runs tells of one, in one go."""
    with disk_errors(folder), database.connect(folder) as connection:
        wanted = "SELECT key, value FROM meta WHERE key IN ('config', 'status', 'phase')"
        meta = {row["key"]: json.loads(row["value"]) for row in connection.execute(wanted)}
        query = "SELECT message FROM events WHERE kind = 'failed' ORDER BY id DESC LIMIT 1"
        failed = connection.execute(query).fetchone() if meta["status"] == "failed" else None
        query = "SELECT round, seconds, metrics, finished_at FROM rounds ORDER BY round"
        rounds = [
            RoundGlance(row[0], row[1], json.loads(row[2]), row[3]) for row in connection.execute(query)
        ]
        query = "SELECT kind FROM commands WHERE taken_at IS NULL ORDER BY id"
        pending = [str(row["kind"]) for row in connection.execute(query)]
    return Glance(**meta, failure=failed["message"] if failed else "", rounds=rounds, pending=pending)


def records_mark(folder: Path) -> tuple[Any, ...]:
    """Return something that differs once a run's rounds, answers or events have changed."""
    query = (
        "SELECT (SELECT MAX(id) FROM events), (SELECT MAX(rowid) FROM node_rounds), "
        "(SELECT MAX(rowid) FROM ledger), (SELECT COUNT(*) FROM rounds), "
        "(SELECT MAX(finished_at) FROM rounds)"
    )
    with disk_errors(folder), database.connect(folder) as connection:
        return tuple(connection.execute(query).fetchone())


@dataclass(frozen=True, kw_only=True)
class NodeTotal:
    """One client over a whole run; seconds are means over its accepted answers.

    Attributes:
        node: its number in the federation.
        state: ``ok``; ``late`` (it missed the last deadline); ``failing`` (its last answer did not count);
            ``gone`` (it was there and is no more); ``absent`` (a deployment's node that never came);
            ``loading`` (it is there, and has not introduced itself yet);
            ``quarantined``; or ``idle`` (of a simulation, and not asked so far).
        last_round: when it was last asked; -1 for never.
        last_seen_at: Unix time of the end of the last round that counted an answer of it.
        loss: of its last training.
        scores: of the last global model that it was asked to measure, on its own held-out texts, by metric.
        reason: of its last answer that did not count.
        device: what it told about itself when it joined.
        known: whether the run keeps anything about it.
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
    scores: dict[str, float] = field(default_factory=dict)
    compute_seconds: float | None = None
    transfer_seconds: float | None = None
    peak_rss_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    reason: str = ""
    device: dict[str, Any] = field(default_factory=dict)
    known: bool = True


_WORKED = "status = 'accepted' AND exchange NOT IN ('keys', 'shares', 'unmask')"
"""The steps of secure aggregation around an answer are none by themselves."""
_TOTALS = f"""
SELECT node, MAX(round) AS last_round,
       SUM({_WORKED}) AS accepted, SUM(status = 'late') AS late, SUM(status = 'failed') AS failed,
       SUM(status = 'rejected') AS rejected, MAX(examples) AS examples, MAX(peak_rss_bytes) AS peak_rss_bytes,
       AVG(CASE WHEN {_WORKED} THEN compute_seconds END) AS compute_seconds,
       AVG(CASE WHEN {_WORKED} THEN transfer_seconds END) AS transfer_seconds,
       MAX(CASE WHEN status = 'accepted' THEN round END) AS last_accepted
FROM node_rounds GROUP BY node
"""
# SQLite's bare columns: of the row that has the maximum.
_LAST = "SELECT node, status, MAX(rowid) FROM node_rounds WHERE status != 'unused' GROUP BY node"
_LAST_LOSS = """
SELECT node, loss, MAX(rowid) FROM node_rounds WHERE loss IS NOT NULL AND exchange != 'evaluate' GROUP BY node
"""
_LAST_SCORES = """
WHERE rowid IN (
    SELECT MAX(rowid) FROM node_rounds WHERE exchange = 'evaluate' AND status = 'accepted' GROUP BY node
)
"""
_LAST_REASON = """
SELECT node, reason, MAX(rowid) FROM node_rounds WHERE status IN ('late', 'failed', 'rejected') GROUP BY node
"""
_BYTES = "SELECT node, direction, SUM(bytes) AS bytes FROM ledger GROUP BY node, direction"
_TOLD = """
SELECT kind, fields FROM events WHERE kind IN ('joined', 'left', 'back', 'quarantine', 'release') ORDER BY id
"""


def node_totals(folder: Path) -> list[NodeTotal]:
    """Sum up the clients of a run, ascending: those too that nothing has been heard of."""
    with disk_errors(folder), database.connect(folder) as connection:

        def rows(query: str) -> list[Any]:
            return connection.execute(query).fetchall()

        totals = {row["node"]: dict(row) for row in rows(_TOTALS)}
        last = {row["node"]: row["status"] for row in rows(_LAST)}
        losses = {row["node"]: row["loss"] for row in rows(_LAST_LOSS)}
        scored = {row.node: row for row in select(connection, NodeRound, "node_rounds", _LAST_SCORES)}
        reasons = {row["node"]: row["reason"] or "" for row in rows(_LAST_REASON)}
        moved = {(row["node"], row["direction"]): row["bytes"] for row in rows(_BYTES)}
        # For which of them the run waits while they load their models, its phase tells.
        loading = set((database.meta(connection, "phase") or {}).get("loading_nodes", ()))
        told = _Told([(row["kind"], json.loads(row["fields"])) for row in rows(_TOLD)], loading)
        ends = {row["round"]: row["finished_at"] for row in rows("SELECT round, finished_at FROM rounds")}
    met = {*totals, *told.devices, *(node for node, _ in moved)} - {NOBODY}
    found = []
    config = Run(folder).config
    for node in sorted(met | set(range(config.clients))):
        total = totals.get(node, {})
        total.pop("node", None)
        seen = ends.get(total.pop("last_accepted", None))
        found.append(
            NodeTotal(
                node=node,
                state=told.state(node, last.get(node), known=node in met),
                last_seen_at=seen,
                loss=losses.get(node),
                scores=own_scores(scored[node], config.metric) if node in scored else {},
                bytes_up=moved.get((node, "up"), 0),
                bytes_down=moved.get((node, "down"), 0),
                reason=reasons.get(node, ""),
                device=told.devices.get(node, {}),
                known=node in met,
                **total,
            )
        )
    return found


class _Told:
    """What the log says of clients: what they told when they last joined, who is away, who is set aside."""

    def __init__(self, events: list[tuple[str, dict[str, Any]]], loading: set[int]) -> None:
        self.devices: dict[int, dict[str, Any]] = {}
        self._loading = loading
        self._gone: set[int] = set()
        self._quarantined: set[int] = set()
        for kind, fields in events:
            node = fields.get("node")
            if isinstance(node, int):
                self._note(kind, node, fields.get("device"))

    def _note(self, kind: str, node: int, device: Any) -> None:
        if kind == "joined":
            self.devices[node] = device if isinstance(device, dict) else {}
        if kind in ("joined", "back"):
            self._gone.discard(node)
        elif kind == "left":
            self._gone.add(node)
        elif kind == "quarantine":
            self._quarantined.add(node)
        else:
            self._quarantined.discard(node)

    def state(self, node: int, last: str | None, *, known: bool) -> str:
        """Return a client's state, given what became of its last answer."""
        if node in self._quarantined:
            return "quarantined"
        if node in self._loading:
            return "loading"
        if node in self._gone:
            return "gone"
        if not known:
            # Only the nodes of a deployment tell of their devices.
            return "absent" if self.devices else "idle"
        return {None: "ok", "accepted": "ok", "late": "late"}.get(last, "failing")
