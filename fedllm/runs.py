"""Reading runs, while they run and after: for reports, comparisons and the dashboard.

Nothing here waits for the process that writes, or makes it wait.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm import run_database, run_lock
from fedllm.config import RunConfig
from fedllm.durable import disk_errors, to_json
from fedllm.errors import StoreError
from fedllm.run_database import (
    Command,
    Event,
    NodeLog,
    NodeRound,
    Round,
    connect,
    insert,
    select,
    transaction,
)

__all__ = ["Command", "Event", "NodeLog", "NodeRound", "Round", "Run", "find"]

_TRAFFIC = ("round", "node", "direction", "exchange", "record")


class Run:
    """One run folder, read-only but for :meth:`post_command` and :meth:`audit`; threads may share it.

    Raises:
        StoreError: there is no run, or a newer fedllm wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: RunConfig = RunConfig.from_json(self._meta("config"))

    def _meta(self, key: str) -> Any:
        with disk_errors(self.folder), connect(self.folder) as connection:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise StoreError(
                f"{self.folder / run_database.FILE} is damaged: it does not hold the run's {key}"
            )
        return json.loads(row["value"])

    def _document(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            document: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {path}: {error}") from error
        return document

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``; rewritten after each round of a live run."""
        return self._document("summary.json")

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, git commit, engine."""
        return self._document("provenance.json")

    @property
    def partition(self) -> dict[str, Any]:
        """``partition.json``, or an empty mapping where none was written."""
        return self._document("partition.json")

    @property
    def pid(self) -> int | None:
        """The process that writes this run now, or None."""
        return run_lock.holder(self.folder)

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed``, ``stopped``, or ``interrupted`` (killed)."""
        # In this order: a run that ends writes its status before it lets go of the folder.
        pid = self.pid
        status = str(self._meta("status"))
        return "interrupted" if status == "running" and pid is None else status

    @property
    def phase(self) -> dict[str, Any]:
        """What a live run is doing: ``name``, ``at`` (Unix time) and whatever the engine adds."""
        phase: dict[str, Any] = self._meta("phase")
        return phase

    def rounds(self, after: int = -1) -> list[Round]:
        """Committed rounds after a number, ascending; round 0 is the setup."""
        with disk_errors(self.folder), connect(self.folder) as connection:
            return list(select(connection, Round, "rounds", "WHERE round > ? ORDER BY round", (after,)))

    def nodes(self, *, round: int | None = None, node: int | None = None) -> list[NodeRound]:
        """What became of each client, by round and node; of one round, one node, or all."""
        where, values = _where(round=round, node=node)
        with disk_errors(self.folder), connect(self.folder) as connection:
            order = "ORDER BY round, node, rowid"
            return list(select(connection, NodeRound, "node_rounds", f"{where} {order}", values))

    def traffic(
        self, by: Sequence[str] = ("round", "direction"), *, round: int | None = None, node: int | None = None
    ) -> list[dict[str, Any]]:
        """Bytes summed over everything but the columns named.

        Args:
            by: any of ``round``, ``node``, ``direction``, ``exchange``, ``record``.
            round: only this round.
            node: only this client.

        Returns:
            One mapping per group: the columns, ``bytes``, and ``dense`` (the same without a codec).
        """
        if unknown := set(by) - set(_TRAFFIC):
            raise ValueError(f"no such ledger column: {sorted(unknown)}; valid are {_TRAFFIC}")
        where, values = _where(round=round, node=node)
        columns = ", ".join(by)
        query = (
            f"SELECT {columns}, SUM(bytes) AS bytes, SUM(COALESCE(dense, bytes)) AS dense "
            f"FROM ledger {where} GROUP BY {columns} ORDER BY {columns}"
        )
        with disk_errors(self.folder), connect(self.folder) as connection:
            return [dict(row) for row in connection.execute(query, values)]

    def events(self, after: int = 0, limit: int = 1000) -> list[Event]:
        """Lines of the log with an ``id`` above ``after``, oldest first."""
        with disk_errors(self.folder), connect(self.folder) as connection:
            return list(
                select(connection, Event, "events", "WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
            )

    def newest_events(self, limit: int = 1000) -> list[Event]:
        """Return the last lines of the log, oldest first."""
        with disk_errors(self.folder), connect(self.folder) as connection:
            found = list(select(connection, Event, "events", "ORDER BY id DESC LIMIT ?", (limit,)))
        return found[::-1]

    def node_logs(self, after: int = 0, *, node: int | None = None, limit: int = 1000) -> list[NodeLog]:
        """What nodes told from their own logs, with an ``id`` above ``after``, oldest first."""
        where, values = _where(node=node)
        rest = f"{where or 'WHERE TRUE'} AND id > ? ORDER BY id LIMIT ?"
        with disk_errors(self.folder), connect(self.folder) as connection:
            # Missing where no node ever told anything.
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'node_logs'").fetchone():
                return []
            return list(select(connection, NodeLog, "node_logs", rest, (*values, after, limit)))

    def post_command(self, kind: str, by: str, **arguments: Any) -> None:
        """Ask the run for something (``pause``, ``resume``, ``stop``, ...); it looks between rounds."""
        command = Command(at=time.time(), kind=kind, by=by, arguments=arguments)
        with (
            disk_errors(self.folder),
            connect(self.folder, write=True) as connection,
            transaction(connection),
        ):
            insert(connection, "commands", [command])
            _audit(connection, by, kind, to_json(arguments))

    def audit(self, who: str, action: str, detail: str = "") -> None:
        """Note who did what; commands note themselves."""
        with (
            disk_errors(self.folder),
            connect(self.folder, write=True) as connection,
            transaction(connection),
        ):
            _audit(connection, who, action, detail)

    def audit_log(self) -> list[dict[str, Any]]:
        """Return ``at`` (Unix time), ``who``, ``action``, ``detail``, oldest first."""
        with disk_errors(self.folder), connect(self.folder) as connection:
            query = "SELECT at, who, action, detail FROM audit ORDER BY id"
            return [dict(row) for row in connection.execute(query)]


def _where(**conditions: int | None) -> tuple[str, tuple[int, ...]]:
    given = {column: value for column, value in conditions.items() if value is not None}
    clause = " AND ".join(f"{column} = ?" for column in given)
    return (f"WHERE {clause}" if clause else ""), tuple(given.values())


def _audit(connection: Any, who: str, action: str, detail: str) -> None:
    query = "INSERT INTO audit (at, who, action, detail) VALUES (?, ?, ?, ?)"
    connection.execute(query, (time.time(), who, action, detail))


def find(root: Path) -> list[Path]:
    """Return the run folders directly below a folder, by name."""
    if not root.is_dir():
        raise StoreError(f"{root} is not a folder of runs")
    return sorted(path.parent for path in root.glob(f"*/{run_database.FILE}"))
