"""Reading runs, while they run and after: for reports, comparisons and the dashboard.

Nothing here waits for the process that writes, or makes it wait.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig, total_rounds
from fedllm.errors import StoreError
from fedllm.here import located
from fedllm.runs import database
from fedllm.runs import lock as run_lock
from fedllm.runs.database import GO_ON_FROM, GO_ON_TO, connect, insert, select, transaction
from fedllm.runs.durable import disk_errors, to_json
from fedllm.runs.provenance import chain
from fedllm.runs.provenance.chain import Link
from fedllm.runs.records import FILE, OWN, TEXTS, Command, Event, NodeLog, NodeRound, RoundRecord
from fedllm.runs.summary import Best, best_of

__all__ = ["Run", "find"]

_TRAFFIC = ("round", "node", "direction", "exchange", "record")


class Run:
    """One run folder; threads may share it.

    Read-only but for :meth:`post_command`, :meth:`audit` and what is said of how the run goes on.

    Raises:
        StoreError: there is no run, or a newer fedllm wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _ = self.config

    @property
    def config(self) -> RunConfig:
        """The run's configuration; a run that goes on after its end gets other ``rounds``."""
        return located(_configuration(self._meta("config")), self.folder)

    def _meta(self, key: str) -> Any:
        with disk_errors(self.folder), connect(self.folder) as connection:
            value = database.meta(connection, key)
        if value is None:
            raise StoreError(f"{self.folder / FILE} is damaged: it does not hold the run's {key}")
        return value

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
        """``summary.json``, rewritten after each round; a run that was killed is ``interrupted`` in it."""
        pid = self.pid
        document = self._document("summary.json")
        if document.get("status") == "running" and pid is None:
            document["status"] = "interrupted"
        return document

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, git commit, engine."""
        return self._document("provenance.json")

    @property
    def identity(self) -> str:
        """What clients file their state of this run under; ``StoreError`` where nothing says it."""
        told = self.provenance.get("run")
        if told is None:
            raise StoreError(
                f"{self.folder / 'provenance.json'} does not say which run this is, and clients file what "
                "they keep of it under that: put the file back, or begin another run"
            )
        return str(told)

    @property
    def partition(self) -> dict[str, Any]:
        """``partition.json``, or an empty mapping where none was written.

        It says how the texts that the run names are shared out. Where devices have texts of their own it
        says nothing of ``clients``: those hold what nobody else knows.
        """
        found = self._document("partition.json")
        return {**found, "clients": []} if found and self.own_texts else found

    @property
    def own_texts(self) -> bool:
        """Whether a client trains on texts of its own, in place of a part of those that the run names."""
        query = "SELECT 1 FROM events WHERE kind = 'joined' AND json_extract(fields, ?) = ? LIMIT 1"
        with disk_errors(self.folder), connect(self.folder) as connection:
            return connection.execute(query, (f"$.device.{TEXTS}", OWN)).fetchone() is not None

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

    def rounds(self, after: int = -1) -> list[RoundRecord]:
        """Committed rounds after a number, ascending; round 0 is the starting point."""
        with disk_errors(self.folder), connect(self.folder) as connection:
            return list(database.rounds(connection, after))

    @property
    def best(self) -> Best | None:
        """The best round so far; None where nothing was measured."""
        return best_of(((record.round, record.metrics) for record in self.rounds()), self.config.metric)

    def link(self, round: int) -> Link | None:
        """Return the link that was signed as a round was committed; None where the run keeps no chain."""
        with disk_errors(self.folder), connect(self.folder) as connection:
            links = chain.kept(connection)
        told = [(link, json.loads(link.body)) for link in links]
        return next((o for o, b in reversed(told) if (b["kind"], b["round"]) == (chain.ROUND, round)), None)

    def nodes(
        self, *, round: int | None = None, node: int | None = None, limit: int = -1, offset: int = 0
    ) -> list[NodeRound]:
        """What became of each client, by round and node; of one round, one node, or all.

        Args:
            round: only this round.
            node: only this client.
            limit: rows at most; negative for all.
            offset: rows to pass over first.
        """
        where, values = _where(round=round, node=node)
        with disk_errors(self.folder), connect(self.folder) as connection:
            rest = f"{where} ORDER BY round, node, rowid LIMIT ? OFFSET ?"
            return list(select(connection, NodeRound, "node_rounds", rest, (*values, limit, offset)))

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

    @property
    def goes_on_from(self) -> int | None:
        """The round from which the run is to go on, set by :meth:`go_on_from`; None means its last."""
        return self._said(GO_ON_FROM)

    def go_on_from(self, round: int | None) -> None:
        """Let whoever resumes the run go on from an earlier round; nothing is forgotten before that.

        Args:
            round: of a checkpoint; None takes back what was said.
        """
        self._say(GO_ON_FROM, round)

    @property
    def goes_on_as(self) -> RunConfig:
        """The configuration with which the run goes on: its own, or one of more rounds (:meth:`extended`)."""
        total = self.goes_on_to
        return self.config if total is None else self.config.model_copy(update={"rounds": total})

    @property
    def goes_on_to(self) -> int | None:
        """The rounds to which the run is to go on after its end; None unless somebody asked for more."""
        return self._said(GO_ON_TO)

    @property
    def done(self) -> int:
        """Rounds committed."""
        with disk_errors(self.folder), connect(self.folder) as connection:
            return connection.execute("SELECT MAX(round) AS last FROM rounds").fetchone()["last"] or 0

    @contextmanager
    def going_on(self, rounds: str | None) -> Iterator[RunConfig | None]:
        """Let the run go on: conduct it, in the block, with the configuration that is yielded.

        Args:
            rounds: of a finished run that is to go on: ``+5`` more, or ``20`` in all.

        Yields:
            None where it is finished, and nobody asked for more.

        Raises:
            ConfigError: ``rounds`` is no number of rounds.
            StoreError: as :meth:`extended`.
        """
        asked, finished = self.goes_on_to, self.status == "finished"
        done = self.done if finished else self.config.rounds
        total = None if rounds is None else total_rounds(rounds, done)
        if total is not None and total != (asked or done):
            with self.extended(total) as config:
                yield config
        elif finished and asked is None and self.goes_on_from is None:
            yield None
        else:
            yield self.goes_on_as

    @contextmanager
    def extended(self, total: int) -> Iterator[RunConfig]:
        """Let this finished run go on to more rounds: conduct it, in the block, with what is yielded.

        The run itself changes its configuration, and notes it, once it goes on; what is refused before that
        leaves it finished as it was.

        Args:
            total: rounds in all, more than it has done.

        Raises:
            StoreError: it is not finished, or has done as many.
        """
        done, status = self.done, self.status
        if status != "finished":
            raise StoreError(
                f"{self.folder} is {status}: let it finish its {self.config.rounds} rounds "
                "before it is given more"
            )
        if total <= done:
            raise StoreError(
                f"{self.folder} has done {done} rounds and cannot go on to {total}: "
                f"ask for more than {done} in all, or for +1 and more"
            )
        self._say(GO_ON_TO, total)
        try:
            yield self.goes_on_as
        except BaseException:
            self.stay()
            raise

    def stay(self) -> None:
        """Take back what was said of how the run goes on: it was refused."""
        if self.goes_on_from is not None:
            self._say(GO_ON_FROM, None)
        # A run that is not finished has begun to take more rounds up, and goes on with them.
        if self.goes_on_to is not None and self.status == "finished":
            self._say(GO_ON_TO, None)

    def _said(self, key: str) -> int | None:
        with disk_errors(self.folder), connect(self.folder) as connection:
            said: int | None = database.meta(connection, key)
        return said

    def _say(self, key: str, value: int | None) -> None:
        with (
            disk_errors(self.folder),
            connect(self.folder, write=True) as connection,
            transaction(connection),
        ):
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, to_json(value)))

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


@lru_cache(maxsize=256)
def _configuration(text: str) -> RunConfig:
    return RunConfig.from_json(text)


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
    return sorted(path.parent for path in root.glob(f"*/{FILE}"))
