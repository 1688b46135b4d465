"""Taking one client out of a run's records."""

from __future__ import annotations

import json
import sqlite3

from fedllm.durable import to_json
from fedllm.run_database import NODE_LOGS, transaction

__all__ = ["NOBODY", "forget"]

NOBODY = -1
"""Whom the bytes of a forgotten client are counted under: what crossed the network stays true."""


def forget(connection: sqlite3.Connection, node: int) -> None:
    """Delete a client's answers, log and device facts; keep its bytes, without its number."""
    with transaction(connection):
        connection.execute("DELETE FROM node_rounds WHERE node = ?", (node,))
        connection.execute(NODE_LOGS)
        connection.execute("DELETE FROM node_logs WHERE node = ?", (node,))
        connection.execute("UPDATE ledger SET node = ? WHERE node = ?", (NOBODY, node))
        for row in connection.execute("SELECT id, fields FROM events").fetchall():
            if json.loads(row["fields"]).get("node") == node:
                connection.execute("DELETE FROM events WHERE id = ?", (row["id"],))
        for row in connection.execute("SELECT round, details FROM rounds").fetchall():
            details = json.loads(row["details"])
            if node in details.get("accepted", []):
                details["accepted"].remove(node)
                values = (to_json(details), row["round"])
                connection.execute("UPDATE rounds SET details = ? WHERE round = ?", values)
