"""What others than its own process change in a run: that it died without a word, and whom it forgets."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from fedllm.errors import StoreError
from fedllm.runs.database import NODE_LOGS, connect, insert, meta, transaction
from fedllm.runs.durable import disk_errors, replace_file, to_json
from fedllm.runs.ledger import NOBODY
from fedllm.runs.lock import RunLock, holder
from fedllm.runs.provenance import chain
from fedllm.runs.reader import Run
from fedllm.runs.records import CHECKING, Event
from fedllm.runs.writer import RunStore

__all__ = ["forget", "settle", "unsettled"]


def unsettled(folder: Path) -> bool:
    """Whether a run calls itself running, and no process runs it; raises ``StoreError`` for what is none."""
    if holder(folder) is not None:
        return False
    with connect(folder) as connection:
        return bool(meta(connection, "status") == "running")


def settle(folder: Path) -> bool:
    """Set the status of an unsettled run to ``interrupted``; returns whether it was one.

    Nothing else changes: whoever resumes the run finds it as its process left it.

    Raises:
        StoreError: the folder cannot be written.
    """
    if not unsettled(folder):
        return False
    try:
        lock = RunLock(folder)
    except StoreError:
        return False  # somebody has just taken the run up again
    try:
        # Whoever resumes a run that died over the check of its result must learn that.
        left = {"name": CHECKING} if Run(folder).phase.get("name") == CHECKING else {}
        with disk_errors(folder), connect(folder, write=True) as connection, transaction(connection):
            if meta(connection, "status") != "running":
                return False
            last = connection.execute("SELECT MAX(round) AS last FROM rounds").fetchone()["last"]
            message = "its process died, and did not say why"
            event = Event(at=time.time(), kind="interrupted", message=message, round=last)
            insert(connection, "events", [event])
            for key, value in {"status": "interrupted", "phase": left}.items():
                connection.execute("UPDATE meta SET value = ? WHERE key = ?", (to_json(value), key))
        if told := Run(folder).summary:
            replace_file(folder / "summary.json", to_json({**told, "status": "interrupted"}, indent=2))
        return True
    finally:
        lock.release()


def forget(folder: Path, node: int) -> None:
    """Delete a client's answers, log, device facts, texts' numbers and state; keep its bytes, numberless.

    Args:
        folder: of a run that is over.
        node: the client's number.

    Raises:
        StoreError: the run is under way, or its folder cannot be written.
    """
    # Opened as a writer, so that nothing resumes the run meanwhile.
    with RunStore.open(folder), disk_errors(folder), connect(folder, write=True) as connection:
        _forget_texts(folder / "partition.json", node)
        shutil.rmtree(folder / "clients" / str(node), ignore_errors=True)
        with transaction(connection):
            connection.execute("DELETE FROM node_rounds WHERE node = ?", (node,))
            connection.execute(NODE_LOGS)
            connection.execute("DELETE FROM node_logs WHERE node = ?", (node,))
            connection.execute("UPDATE ledger SET node = ? WHERE node = ?", (NOBODY, node))
            chain.forget(connection, node)
            for row in connection.execute("SELECT id, fields FROM events").fetchall():
                if json.loads(row["fields"]).get("node") == node:
                    connection.execute("DELETE FROM events WHERE id = ?", (row["id"],))
            for row in connection.execute("SELECT round, details FROM rounds").fetchall():
                details = json.loads(row["details"])
                if node in details.get("accepted", []):
                    details["accepted"].remove(node)
                    values = (to_json(details), row["round"])
                    connection.execute("UPDATE rounds SET details = ? WHERE round = ?", values)
            # Who reads along sees by a new event that something has changed.
            said = "what the run kept about a client was deleted"
            insert(connection, "events", [Event(at=time.time(), kind="forgotten", message=said)])


def _forget_texts(path: Path, node: int) -> None:
    """Take out which texts a client held, and how many of each class."""
    try:
        partition = json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    partition["clients"] = [client for client in partition["clients"] if client["node"] != node]
    replace_file(path, to_json(partition))
