"""The tables of ``run.db``, in which records live: nothing outside this room writes SQL."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from fedllm.errors import StoreError
from fedllm.runs.durable import sync_folder, to_json
from fedllm.runs.records import FILE, NodeLog, RoundRecord

__all__ = [
    "GO_ON_FROM",
    "GO_ON_TO",
    "NODE_LOGS",
    "NODE_LOGS_KEPT",
    "SCHEMA_VERSION",
    "connect",
    "create",
    "insert",
    "keep_log",
    "meta",
    "open_connection",
    "rounds",
    "select",
    "transaction",
]

GO_ON_FROM = "go_on_from"
"""Key of ``meta``, missing in most runs: the round of the checkpoint from which the run is to go on."""
GO_ON_TO = "go_on_to"
"""Key of ``meta``, missing in most runs: the rounds to which the run is to go on after its end."""
SCHEMA_VERSION = 1
_TRIES = 5
"""Copies of a database that somebody is writing to, before giving up."""


NODE_LOGS = """
CREATE TABLE IF NOT EXISTS node_logs (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, round INTEGER NOT NULL, node INTEGER NOT NULL,
    lines TEXT NOT NULL)
"""
"""Made when the first lines come: a simulation has none."""
NODE_LOGS_KEPT = 100
"""Of each node; with at most 2,000 characters a reply, a node fills 200 kB of a run at most."""

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

    Whoever may only read sees what the owner sees.

    Raises:
        StoreError: there is no run, it cannot be read, or a newer fedllm wrote it.
    """
    path = folder / FILE
    try:
        if not path.is_file():
            raise StoreError(f"{folder} holds no run: {FILE} is missing")
        connection = _open(path, "mode=rw") if write else _open_to_read(path)
    except sqlite3.OperationalError as error:
        raise StoreError(f"cannot open {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise StoreError(f"cannot read {error.filename or path}: {error.strerror}") from error
    try:
        _check_version(connection, path)
        yield connection
    finally:
        connection.close()


def _open_to_read(path: Path) -> sqlite3.Connection:
    try:
        return _open(path, "mode=ro")
    except sqlite3.OperationalError as error:
        # SQLite reads beside a log only with side files, which are missing here and may not be made.
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
    logged = _state(_log(path))
    return _copied(path) if logged and logged[0] else _open(path, "immutable=1")


def _open(path: Path, mode: str) -> sqlite3.Connection:
    """Open a database and read from it once, which is when SQLite finds out what it may do."""
    connection = open_connection(f"{path.resolve().as_uri()}?{mode}", uri=True)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _copied(path: Path) -> sqlite3.Connection:
    """Return a copy in memory of a database and of the log that a killed writer has left beside it.

    Both are copied as of one moment: again, until neither has changed meanwhile.
    """
    log = _log(path)
    with tempfile.TemporaryDirectory(prefix="fedllm-") as private:
        copy = Path(private) / path.name
        for _ in range(_TRIES):
            before = _state(path), _state(log)
            for source in (path, log):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(source, copy.with_name(source.name))
            if (_state(path), _state(log)) == before:
                break
            _log(copy).unlink(missing_ok=True)
        else:
            raise StoreError(f"{path} changes too fast to be read without write permission: try again")
        with contextlib.closing(_open(copy, "mode=rw")) as whole:
            connection = open_connection(":memory:")
            whole.backup(connection)
    return connection


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


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


def create(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make ``run.db`` with its tables and ``facts`` as the first rows of ``meta``; it appears complete."""
    unfinished = folder / f".{FILE}-new"
    with contextlib.closing(open_connection(str(unfinished))) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        with transaction(connection):
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            rows = [(key, to_json(value)) for key, value in facts.items()]
            connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    unfinished.rename(folder / FILE)
    sync_folder(folder)


def meta(connection: sqlite3.Connection, key: str) -> Any:
    """Return the value that a run keeps under a key, or None where it keeps none."""
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else json.loads(row["value"])


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


def keep_log(connection: sqlite3.Connection, log: NodeLog) -> None:
    """Insert what a node said, and delete what it said before its newest :data:`NODE_LOGS_KEPT`."""
    connection.execute(NODE_LOGS)
    insert(connection, "node_logs", [log])
    query = (
        "DELETE FROM node_logs WHERE node = ?1 AND id <= "
        "(SELECT id FROM node_logs WHERE node = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)"
    )
    connection.execute(query, (log.node, NODE_LOGS_KEPT))


def select(
    connection: sqlite3.Connection,
    kind: type[Record],
    table: str,
    rest: str = "",
    values: tuple[Any, ...] = (),
) -> Iterator[Record]:
    """Read records back; ``rest`` is the SQL after the table's name.

    Raises:
        StoreError: a row holds what no run writes.
    """
    columns = _columns(kind, identity=True)
    coded = [index for index, name in enumerate(columns) if name in _JSON_COLUMNS]
    for row in connection.execute(f"SELECT {', '.join(columns)} FROM {table} {rest}", values):
        fields = list(row)
        for index in coded:
            fields[index] = _decoded(fields[index], table)
        yield kind(**dict(zip(columns, fields, strict=True)))


def _decoded(text: str, table: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise StoreError(f"{FILE} is damaged: its table {table} holds {text[:40]!r}") from error


def rounds(connection: sqlite3.Connection, after: int = -1) -> Iterator[RoundRecord]:
    """Read the committed rounds after a number, ascending."""
    for record in select(connection, RoundRecord, "rounds", "WHERE round > ? ORDER BY round", (after,)):
        # Runs of earlier versions kept what was measured at the starting point among the details.
        details = dict(record.details)
        initial = details.pop("initial", None)
        yield record if initial is None else dataclasses.replace(record, metrics=initial, details=details)
