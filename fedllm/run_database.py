"""The tables of ``run.db`` and the records that live in them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedllm.durable import sync_folder, to_json
from fedllm.errors import StoreError

__all__ = [
    "FILE",
    "NODE_LOGS",
    "SCHEMA_VERSION",
    "Command",
    "Event",
    "NodeLog",
    "NodeRound",
    "Round",
    "connect",
    "create",
    "insert",
    "open_connection",
    "select",
    "transaction",
]

FILE = "run.db"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Round:
    """One committed round; round 0 is the setup before the first, for runs that have one.

    Attributes:
        round: number from 0.
        attempt: attempts at this round that missed their quorum before this one.
        metrics: on the server's test set (``accuracy``, ``loss``, ``perplexity``); empty where not evaluated.
        seconds: wall time of the round, evaluation included.
        client_compute: seconds that clients spent computing, summed over clients.
        participants: clients whose reply counted.
        failures, rejected: replies that never came or said they failed, and replies that failed a gate.
        peak_rss_bytes: largest resident set of any process that took part.
        forward, backward: batches that went through the whole model.
        reference_bytes: what FedAvg of the whole model in fp32 would have moved, both ways.
        epsilon, delta: privacy spent since the start of the run.
        state_sha256: hash of the global trainable tensors after the round.
        details: the method's own facts (ranks, directions, energy threshold, variance).
        bytes_up, bytes_down: filled in by the store from the ledger.
        finished_at: Unix time, filled in by the store.
    """

    round: int
    attempt: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    client_compute: float = 0.0
    participants: int = 0
    failures: int = 0
    rejected: int = 0
    peak_rss_bytes: int = 0
    forward: float = 0.0
    backward: float = 0.0
    reference_bytes: int = 0
    epsilon: float | None = None
    delta: float | None = None
    state_sha256: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    finished_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NodeRound:
    """What became of one client in one exchange of one round.

    Attributes:
        round, attempt, exchange: which exchange; ``exchange`` is its kind.
        node: the client's number in the federation.
        status: ``accepted``, ``late``, ``failed``, ``rejected``, or ``unused`` (over-selected, not needed).
        reason: one sentence where the reply did not count.
        examples: texts the client trained or evaluated on.
        loss: the client's mean training loss.
        compute_seconds, transfer_seconds: on the client, and between the two (0 in a simulation).
        update_norm: L2 norm of the decoded update.
        peak_rss_bytes: the client's resident set.
        metrics: further numbers that the client reported.
    """

    round: int
    node: int
    status: Literal["accepted", "late", "failed", "rejected", "unused"]
    attempt: int = 0
    exchange: str = "fit"
    reason: str | None = None
    examples: int = 0
    loss: float | None = None
    compute_seconds: float = 0.0
    transfer_seconds: float = 0.0
    update_norm: float | None = None
    peak_rss_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something worth a line in the log: ``kind`` for machines, ``message`` for people."""

    id: int = 0
    at: float
    kind: str
    message: str
    round: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A wish of the operator, such as ``pause``, ``resume`` or ``stop``, taken by the run between rounds."""

    id: int = 0
    at: float
    kind: str
    by: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NodeLog:
    """Lines of a node's own log, as they came with one of its replies."""

    id: int = 0
    at: float
    round: int
    node: int
    lines: str


NODE_LOGS = """
CREATE TABLE IF NOT EXISTS node_logs (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, round INTEGER NOT NULL, node INTEGER NOT NULL,
    lines TEXT NOT NULL)
"""
"""Made when the first lines come: a simulation has none."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, metrics TEXT NOT NULL, seconds REAL NOT NULL,
    client_compute REAL NOT NULL, participants INTEGER NOT NULL, failures INTEGER NOT NULL,
    rejected INTEGER NOT NULL, peak_rss_bytes INTEGER NOT NULL, forward REAL NOT NULL, backward REAL NOT NULL,
    reference_bytes INTEGER NOT NULL, epsilon REAL, delta REAL, state_sha256 TEXT, details TEXT NOT NULL,
    bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL, finished_at REAL NOT NULL);
CREATE TABLE node_rounds (
    round INTEGER NOT NULL, node INTEGER NOT NULL, status TEXT NOT NULL, attempt INTEGER NOT NULL,
    exchange TEXT NOT NULL, reason TEXT, examples INTEGER NOT NULL, loss REAL, compute_seconds REAL NOT NULL,
    transfer_seconds REAL NOT NULL, update_norm REAL, peak_rss_bytes INTEGER NOT NULL, metrics TEXT NOT NULL);
CREATE INDEX node_rounds_by_round ON node_rounds (round, node);
CREATE INDEX node_rounds_by_node ON node_rounds (node, round);
CREATE TABLE ledger (
    round INTEGER NOT NULL, node INTEGER NOT NULL, direction TEXT NOT NULL, exchange TEXT NOT NULL,
    record TEXT NOT NULL, bytes INTEGER NOT NULL, dense INTEGER);
CREATE INDEX ledger_by_round ON ledger (round, node, direction, bytes);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, message TEXT NOT NULL, round INTEGER,
    fields TEXT NOT NULL);
CREATE TABLE commands (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, by TEXT NOT NULL, arguments TEXT NOT NULL,
    taken_at REAL);
CREATE INDEX commands_waiting ON commands (id) WHERE taken_at IS NULL;
CREATE TABLE audit (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, action TEXT NOT NULL, detail TEXT NOT NULL);
"""

_JSON_COLUMNS = {"metrics", "details", "fields", "arguments"}

Record = TypeVar("Record")


@contextlib.contextmanager
def connect(folder: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    """Open ``run.db`` for as long as the block lasts; readers never wait for the writer, nor it for them.

    Raises:
        StoreError: there is no run, or a newer fedllm wrote it.
    """
    path = folder / FILE
    if not path.is_file():
        raise StoreError(f"{folder} holds no run: {FILE} is missing")
    # On a read-only medium SQLite cannot make its side files; nobody writes there either.
    mode = "mode=rw" if write else "mode=ro" if os.access(folder, os.W_OK) else "immutable=1"
    try:
        connection = open_connection(f"{path.resolve().as_uri()}?{mode}", uri=True)
    except sqlite3.Error as error:
        raise StoreError(f"cannot open {path}: {error}") from error
    try:
        _check_version(connection, path)
        yield connection
    finally:
        connection.close()


def open_connection(database: str, *, uri: bool = False) -> sqlite3.Connection:
    """Open a database as all of this project does: explicit transactions, rows by column name."""
    connection = sqlite3.connect(database, timeout=10, isolation_level=None, uri=uri, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema {version}, this fedllm reads {SCHEMA_VERSION}: use the fedllm that wrote it"
        )


def create(folder: Path, meta: Mapping[str, Any]) -> None:
    """Make ``run.db`` with its tables and the first rows of ``meta``; it appears complete."""
    unfinished = folder / f".{FILE}-new"
    with contextlib.closing(open_connection(str(unfinished))) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        with transaction(connection):
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            rows = [(key, to_json(value)) for key, value in meta.items()]
            connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    unfinished.rename(folder / FILE)
    sync_folder(folder)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block did, or none of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk makes SQLite roll back on its own.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _columns(kind: type[Any], *, identity: bool) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if identity or f.name != "id"]


def insert(connection: sqlite3.Connection, table: str, records: Sequence[Any]) -> None:
    """Insert dataclass records of one class; SQLite numbers those that have an ``id``."""
    if not records:
        return
    columns = _columns(type(records[0]), identity=False)
    rows: Iterable[Sequence[Any]] = map(attrgetter(*columns), records)
    coded = [index for index, name in enumerate(columns) if name in _JSON_COLUMNS]
    if coded:
        rows = [[to_json(v) if i in coded else v for i, v in enumerate(row)] for row in rows]
    places = ", ".join("?" * len(columns))
    connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", rows)


def select(
    connection: sqlite3.Connection,
    kind: type[Record],
    table: str,
    rest: str = "",
    values: tuple[Any, ...] = (),
) -> Iterator[Record]:
    """Read records back; ``rest`` is the SQL after the table's name."""
    columns = _columns(kind, identity=True)
    coded = [index for index, name in enumerate(columns) if name in _JSON_COLUMNS]
    for row in connection.execute(f"SELECT {', '.join(columns)} FROM {table} {rest}", values):
        fields = list(row)
        for index in coded:
            fields[index] = json.loads(fields[index])
        yield kind(**dict(zip(columns, fields, strict=True)))
