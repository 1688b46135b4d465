"""The run store: one folder per run, written by one process, readable by any.

    config.toml      the resolved configuration
    given/           texts and a base model that were given from memory
    provenance.json  versions, git commit, engine
    partition.json   which client holds which texts
    run.db           SQLite (WAL): rounds, node_rounds, ledger, events, commands, audit, node_logs, chain, ...
    signing-key.pem  of the chain, where no federation signs
    rounds.jsonl     one line a round; round 0 is what all start from
    summary.json     schema 1, see :mod:`fedllm.runs.summary`

``run.db`` decides. Everything about a round enters it in one transaction; the text files follow and are
made anew from it whenever a run is opened, so a kill between two writes leaves nothing to repair by hand.
:mod:`fedllm.runs.reader` reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fedllm import here
from fedllm.config import RunConfig
from fedllm.errors import StoreError
from fedllm.runs import database
from fedllm.runs import folder as run_folder
from fedllm.runs.database import insert, select, transaction
from fedllm.runs.durable import append_line, disk_errors, replace_file, to_json
from fedllm.runs.ledger import Entry, Ledger
from fedllm.runs.lock import RunLock
from fedllm.runs.provenance.chain import Chain, Sent, Signer
from fedllm.runs.records import FILE, Command, Event, NodeLog, NodeRound, RoundRecord
from fedllm.runs.summary import Best, Status, bests, round_line, summarise, tries

__all__ = ["RunStore"]

_EXTENDED = "WHERE kind = 'extended' ORDER BY id DESC LIMIT 1"


class RunStore:
    """Writes one run; made by :meth:`create` or :meth:`open`, closed by ``with`` or :meth:`close`.

    A round is written before its checkpoint is saved. Then a checkpoint never names a round that the
    store does not know, and a resumed run calls ``truncate(checkpoint.number)``.

    Attributes:
        folder: where the run lives.
        config: its configuration.
        ledger: totals of every byte so far; fed by :meth:`round`, not by callers.
    """

    def __init__(self, folder: Path, lock: RunLock, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self._lock = lock
        self._connection = connection
        self._guard = threading.RLock()
        meta = self._meta()
        self.config = here.located(RunConfig.from_json(meta["config"]), folder)
        self._workers: int = meta["workers"]
        self._status: Status = meta["status"]
        self._wire: tuple[int | None, int | None] = (meta["wire_up"], meta["wire_down"])
        self._rounds = list(database.rounds(connection))
        extended = list(select(connection, Event, "events", _EXTENDED))
        self._extended = (extended[0].round or 0) if extended else 0
        entries = connection.cursor()
        entries.row_factory = None
        entries.execute("SELECT round, node, direction, exchange, record, bytes, dense FROM ledger")
        self.ledger = Ledger(Entry(*row) for row in entries)
        self._seconds_before: float = meta["seconds"]
        self._opened = time.monotonic()
        self._phase: dict[str, Any] = {}
        self._chain: Chain | None = None

    @classmethod
    def create(
        cls,
        folder: Path,
        config: RunConfig,
        facts: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
        workers: int = 1,
    ) -> Self:
        """Start a new run in a folder that is missing or empty.

        Args:
            folder: the run folder itself.
            config: the resolved configuration.
            facts: provenance: versions, git commit, engine; any JSON.
            overwrite: replace the run that is there, finished or not.
            workers: clients that compute at the same time.

        Raises:
            StoreError: the folder holds a run or something else, is being run, or cannot be written.
        """
        with disk_errors(folder):
            run_folder.require_free(folder, overwrite)
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(folder)
        try:
            run_folder.require_free(folder, overwrite)
            run_folder.clear(folder, keep=here.held(config, folder))
            kept = here.portable(config, folder)
            replace_file(folder / "config.toml", kept.to_toml())
            replace_file(folder / "provenance.json", to_json(facts or {}, indent=2))
            replace_file(folder / "rounds.jsonl", "")
            meta = {
                "config": kept.to_json(), "status": "running", "seconds": 0.0, "workers": workers,
                "wire_up": None, "wire_down": None, "phase": {},
            }  # fmt: skip
            with disk_errors(folder):
                database.create(folder, meta)
                store = cls(folder, lock, database.open_connection(str(folder / FILE)))
        except BaseException:
            lock.release()
            raise
        store._write_summary()
        return store

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Take up a run where it was left, and make its text files agree with ``run.db``.

        Raises:
            StoreError: there is no run, it is being run, is damaged, or was written by a newer fedllm.
        """
        with database.connect(folder), disk_errors(folder):
            lock = RunLock(folder)
        try:
            with disk_errors(folder):
                store = cls(folder, lock, database.open_connection(str(folder / FILE)))
        except BaseException:
            lock.release()
            raise
        store._write_lines(store.rounds)
        store._write_summary()
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder; the run's status stays as it is."""
        with self._guard:
            self._connection.close()
            self._lock.release()

    @property
    def status(self) -> Status:
        """How the run stands."""
        return self._status

    @property
    def last_round(self) -> int:
        """The last committed round; 0 before the first."""
        return self._rounds[-1].round if self._rounds else 0

    @property
    def tries(self) -> int:
        """Evaluations without a better one, since the best or since the run was given more rounds."""
        return tries(self._rounds, self.config.metric, after=self._extended)

    @property
    def bests(self) -> dict[int, Best]:
        """By round, the best one so far; rounds before the first that was measured are missing."""
        found = bests(((record.round, record.metrics) for record in self._rounds), self.config.metric)
        return {number: best for number, best in found if best is not None}

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        """Committed rounds, ascending; round 0 is the starting point."""
        return tuple(self._rounds)

    def sign(self, run: str, signer: Signer) -> None:
        """Chain and sign what is committed from here on; see :mod:`fedllm.runs.provenance.chain`."""
        self._chain = Chain(run, signer)
        with self._writing() as connection:
            self._chain.begin(connection, self._rounds[-1].round if self._rounds else -1)

    def certify(self, node: int, certificate: bytes) -> None:
        """Keep the certificate (DER) by which a node's signatures are known, beside the chain."""
        if self._chain is not None:
            with self._writing() as connection:
                self._chain.certify(connection, node, certificate.hex())

    def round(
        self,
        record: RoundRecord,
        nodes: Iterable[NodeRound] = (),
        entries: Iterable[Entry] = (),
        replies: Iterable[Sent] = (),
    ) -> RoundRecord:
        """Commit a round: its record, its clients, its bytes and its link of the chain, all or nothing.

        Entries of the round's abandoned attempts belong here too: their bytes crossed. ``replies`` are those
        that counted.

        Returns:
            The record with bytes and time filled in.

        Raises:
            StoreError: the round is not the next one, rows name another round, or the disk is full.
        """
        nodes, entries = list(nodes), list(entries)
        expected = {0, 1} if not self._rounds else {self.last_round + 1}
        if record.round not in expected:
            raise StoreError(f"{self.folder}: round {record.round} cannot follow round {self.last_round}")
        strays = ({row.round for row in nodes} | {entry.round for entry in entries}) - {record.round}
        if strays:
            raise StoreError(f"{self.folder}: round {record.round} was given rows of round {min(strays)}")
        own = Ledger(entries)
        record = dataclasses.replace(
            record, bytes_up=own.bytes("up"), bytes_down=own.bytes("down"), finished_at=time.time()
        )
        with self._writing() as connection:
            insert(connection, "rounds", [record])
            insert(connection, "node_rounds", nodes)
            insert(connection, "ledger", entries)
            self._set_meta(seconds=self._seconds())
            if self._chain is not None:
                self._chain.round(connection, record, replies)
        self._rounds.append(record)
        self.ledger.extend(entries)
        append_line(self.folder / "rounds.jsonl", to_json(round_line(record)))
        self._write_summary()
        return record

    def abandon(self, nodes: Iterable[NodeRound], entries: Iterable[Entry]) -> None:
        """Keep what the round that ends a run leaves behind: why answers did not count, and its bytes.

        The round itself was not committed: :meth:`truncate` forgets these rows when the run resumes.
        """
        entries = list(entries)
        with self._writing() as connection:
            insert(connection, "node_rounds", list(nodes))
            insert(connection, "ledger", entries)
        self.ledger.extend(entries)

    def truncate(self, after_round: int) -> None:
        """Forget the rounds after ``after_round`` and set the status to ``running``: a run resumes.

        ``truncate(-1)`` forgets the setup as well.

        Raises:
            StoreError: ``after_round`` was never committed.
        """
        if after_round > self.last_round:
            raise StoreError(
                f"{self.folder} knows rounds up to {self.last_round} only, not {after_round}: "
                f"resume from an earlier checkpoint"
            )
        left = [record for record in self._rounds if record.round <= after_round]
        # First, so that the text never tells of a round that run.db does not know.
        self._write_lines(left)
        with self._writing() as connection:
            for table in ("rounds", "node_rounds", "ledger"):
                connection.execute(f"DELETE FROM {table} WHERE round > ?", (after_round,))
            self._set_meta(status="running", wire_up=None, wire_down=None)
            connection.execute("DELETE FROM meta WHERE key = ?", (database.GO_ON_FROM,))
            if self._chain is not None and len(left) < len(self._rounds):
                self._chain.go_back(connection, after_round)
        self._status, self._wire = "running", (None, None)
        self._rounds = left
        self.ledger.truncate(after_round)
        self._write_summary()

    def extend(self, total: int) -> None:
        """Take more rounds than the run has done, as :meth:`fedllm.runs.reader.Run.extended` asks for.

        ``evaluation.patience`` is counted anew from here.

        ``config.toml`` is first: until ``run.db`` follows it is known to be what was asked for.
        """
        before, self.config = self.config.rounds, self.config.model_copy(update={"rounds": total})
        kept = here.portable(self.config, self.folder)
        replace_file(self.folder / "config.toml", kept.to_toml())
        event = Event(
            at=time.time(),
            kind="extended",
            message=f"goes on after its end: {total} rounds in place of {before}",
            round=self.last_round,
            fields={"before": before, "rounds": total},
        )
        with self._writing() as connection:
            self._set_meta(config=kept.to_json())
            connection.execute("DELETE FROM meta WHERE key = ?", (database.GO_ON_TO,))
            insert(connection, "events", [event])
            if self._chain is not None:
                self._chain.extend(connection, self.last_round, total)
        self._extended = self.last_round
        self._write_summary()

    def finish(
        self,
        status: Status,
        *,
        reason: str | None = None,
        wire_up: int | None = None,
        wire_down: int | None = None,
    ) -> dict[str, Any]:
        """Set how the run ended and return its summary.

        Args:
            status: ``finished``, ``failed`` or ``stopped``.
            reason: one sentence, kept as the last event.
            wire_up: bytes that a deployed transport counted, client to server.
            wire_down: the same, server to client.
        """
        event = Event(at=time.time(), kind=status, message=reason or status, round=self.last_round)
        with self._writing() as connection:
            self._set_meta(
                status=status, seconds=self._seconds(), wire_up=wire_up, wire_down=wire_down, phase={}
            )
            insert(connection, "events", [event])
        self._status, self._wire = status, (wire_up, wire_down)
        self._write_summary()
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Return ``summary.json`` as it stands now."""
        return summarise(
            self.config,
            self._rounds,
            self.ledger,
            status=self._status,
            seconds=self._seconds() if self._status == "running" else self._meta()["seconds"],
            workers=self._workers,
            wire_up=self._wire[0],
            wire_down=self._wire[1],
        )

    def event(self, kind: str, message: str, /, *, round: int | None = None, **fields: Any) -> None:
        """Add a line to the run's log."""
        event = Event(at=time.time(), kind=kind, message=message, round=round, fields=fields)
        with self._writing() as connection:
            insert(connection, "events", [event])

    def node_log(self, node: int, lines: str, *, round: int) -> None:
        """Keep lines of a node's own log, if there are any, and of what it sent before the newest only."""
        if not lines:
            return
        # A terminal must not obey what a node wrote.
        readable = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in lines)
        with self._writing(wait_for_disk=False) as connection:
            database.keep_log(connection, NodeLog(at=time.time(), round=round, node=node, lines=readable))

    def phase(self, name: str, /, **fields: Any) -> None:
        """Say what the run is doing right now, such as ``phase("waiting", round=3, have=3, need=5)``.

        Kept with it, as Unix times: ``at`` when it was said, ``since`` when it was first said of this round,
        and ``moved_at`` when anything in it last changed: saying the same again is no progress.
        """
        now, held = time.time(), self._phase
        same = (held.get("name"), held.get("round")) == (name, fields.get("round"))
        still = same and all(held.get(key) == value for key, value in fields.items())
        self._phase = {
            **fields, "name": name, "at": now,
            "since": held["since"] if same else now, "moved_at": held["moved_at"] if still else now,
        }  # fmt: skip
        # Said often and of no use after a loss of power, so it does not wait for the disk.
        with self._writing(wait_for_disk=False):
            self._set_meta(phase=self._phase)

    def take_commands(self) -> list[Command]:
        """Return what the operator asked for since the last call, oldest first; each is returned once."""
        with self._writing() as connection:
            commands = list(select(connection, Command, "commands", "WHERE taken_at IS NULL ORDER BY id"))
            if commands:
                query = "UPDATE commands SET taken_at = ? WHERE taken_at IS NULL"
                connection.execute(query, (time.time(),))
        return commands

    @contextlib.contextmanager
    def _writing(self, *, wait_for_disk: bool = True) -> Iterator[sqlite3.Connection]:
        with self._guard, disk_errors(self.folder):
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if wait_for_disk else 'NORMAL'}")
            with transaction(self._connection):
                yield self._connection

    def _meta(self) -> dict[str, Any]:
        rows = self._connection.execute("SELECT key, value FROM meta")
        return {row["key"]: json.loads(row["value"]) for row in rows}

    def _set_meta(self, **values: Any) -> None:
        rows = [(to_json(value), key) for key, value in values.items()]
        self._connection.executemany("UPDATE meta SET value = ? WHERE key = ?", rows)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._opened

    def _write_summary(self) -> None:
        replace_file(self.folder / "summary.json", to_json(self.summary(), indent=2))

    def _write_lines(self, rounds: Sequence[RoundRecord]) -> None:
        lines = [f"{to_json(round_line(record))}\n" for record in rounds]
        replace_file(self.folder / "rounds.jsonl", "".join(lines))
