"""The chain of a run: each commit leaves a signed link that holds the hash of the one before it.

    link    body       JSON: number, hash of the link before, run, digest of the configuration, and by kind
              begin      public key of all links, certificate where a federation made it, last round before
              round      digest of the state, and a leaf for each reply that counted
              return     the round that the run goes on after: what came later stays on record
              extend     the rounds that it goes on to after its end
            signature  Ed25519 (RFC 8032) over the body

A leaf is the SHA-256 of a client's number and its reply's digest. Which number has which digest stands beside
the chain, so that a client can be forgotten and the links stay what was signed; in a deployment so does the
node's own signature under it, with the node's certificate: these need no link to be believed.
:mod:`fedllm.runs.provenance.verify` checks all of it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedllm.errors import StoreError
from fedllm.runs import database
from fedllm.runs.database import connect, insert, select
from fedllm.runs.durable import replace_file
from fedllm.runs.records import RoundRecord

__all__ = [
    "BEGIN",
    "CONTEXT",
    "EXTEND",
    "KEY",
    "RETURN",
    "ROUND",
    "Certificate",
    "Chain",
    "Counted",
    "Link",
    "Sent",
    "Signer",
    "configuration",
    "forget",
    "kept",
    "leaf",
    "own_signer",
    "require_signer",
    "signatures",
    "signing_key",
]

KEY = "signing-key.pem"
"""Private key in the folder of a run that no federation signs, or in a federation's own."""
BEGIN, ROUND, RETURN, EXTEND = "begin", "round", "return", "extend"
CONTEXT = b"fedllm chain 1\0"
"""What is signed begins so: a signature under anything else of this key is none of a link."""

_TABLES = """
CREATE TABLE IF NOT EXISTS chain (id INTEGER PRIMARY KEY, body TEXT NOT NULL, signature TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS replies (link INTEGER NOT NULL, node INTEGER NOT NULL, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS signatures (
    node INTEGER NOT NULL, digest TEXT NOT NULL, kind TEXT NOT NULL, signature TEXT NOT NULL,
    PRIMARY KEY (node, digest));
CREATE TABLE IF NOT EXISTS certificates (node INTEGER NOT NULL, certificate TEXT PRIMARY KEY)
"""
"""Made when the first link comes: runs of earlier versions have none."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One link: its text as it was signed, and the signature in hex."""

    id: int = 0
    body: str
    signature: str

    @property
    def hash(self) -> str:
        """SHA-256 of body and signature, which the next link holds."""
        return hashlib.sha256(f"{self.body}\n{self.signature}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A reply that counted: number of the round's link, client, and the digest that the client knows too."""

    link: int
    node: int
    digest: str


class Sent(NamedTuple):
    """What is kept of a reply that counts.

    Attributes:
        node: the client.
        digest: by which client and server call the reply.
        kind: of the exchange that it answers.
        signature: the node's own under both, in hex; empty where nodes have no keys.
    """

    node: int
    digest: str
    kind: str = ""
    signature: str = ""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """By which a node's signatures are known, DER in hex."""

    node: int
    certificate: str


@dataclass(frozen=True)
class Signer:
    """Who signs: a key, and the certificate (PEM) by which a federation's authority calls it its own."""

    key: Ed25519PrivateKey
    certificate: str = ""

    @property
    def public(self) -> str:
        """The public key in hex."""
        return self.key.public_key().public_bytes_raw().hex()


class Chain:
    """Writes the links of one run, each within the transaction that it tells of.

    Args:
        run: the run's identity.
        signer: signs them all.
    """

    def __init__(self, run: str, signer: Signer) -> None:
        self._run, self._signer = run, signer

    def begin(self, connection: sqlite3.Connection, last: int) -> None:
        """Begin a chain after round ``last`` (-1 is none), where there is none yet."""
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        if not connection.execute("SELECT 1 FROM chain").fetchone():
            signer = {"key": self._signer.public, "certificate": self._signer.certificate}
            self._add(connection, BEGIN, round=last, **signer)

    def round(self, connection: sqlite3.Connection, record: RoundRecord, replies: Iterable[Sent]) -> None:
        """Add the link of a round that is being committed, with the replies that it counts."""
        counted = sorted(replies)
        leaves = sorted(leaf(one.node, one.digest) for one in counted)
        number = self._add(connection, ROUND, round=record.round, state=record.state_sha256, replies=leaves)
        rows = [Counted(link=number, node=one.node, digest=one.digest) for one in counted]
        insert(connection, "replies", rows)
        # The same reply may count again after a return; each time it was signed anew.
        signed = [tuple(one) for one in counted if one.signature]
        connection.executemany("INSERT OR REPLACE INTO signatures VALUES (?, ?, ?, ?)", signed)

    def certify(self, connection: sqlite3.Connection, node: int, certificate: str) -> None:
        """Keep by which certificate, DER in hex, a node's signatures are known."""
        connection.execute("INSERT OR IGNORE INTO certificates VALUES (?, ?)", (node, certificate))

    def go_back(self, connection: sqlite3.Connection, last: int) -> None:
        """Note that the run goes on after round ``last``, and that later rounds no longer count."""
        self._add(connection, RETURN, round=last)

    def extend(self, connection: sqlite3.Connection, last: int, total: int) -> None:
        """Note that the run goes on to ``total`` rounds after its end, which was round ``last``."""
        self._add(connection, EXTEND, round=last, rounds=total)

    def _add(self, connection: sqlite3.Connection, kind: str, **facts: Any) -> int:
        newest = next(select(connection, Link, "chain", "ORDER BY id DESC LIMIT 1"), None)
        number = 0 if newest is None else newest.id + 1
        body = {
            "number": number,
            "previous": "" if newest is None else newest.hash,
            "kind": kind,
            "run": self._run,
            "configuration": configuration(connection),
            **facts,
        }
        text = json.dumps(body, sort_keys=True)
        signature = self._signer.key.sign(CONTEXT + text.encode()).hex()
        connection.execute("INSERT INTO chain VALUES (?, ?, ?)", (number, text, signature))
        return number


def leaf(node: int, digest: str) -> str:
    """Return what a link holds of a client's reply.

    >>> leaf(3, "ab")[:16]
    'c9ef05b0e05833a4'
    """
    return hashlib.sha256(f"{node} {digest}".encode()).hexdigest()


def configuration(connection: sqlite3.Connection) -> str:
    """Return the SHA-256 of the configuration as ``run.db`` keeps it."""
    return hashlib.sha256(str(database.meta(connection, "config")).encode()).hexdigest()


def kept(connection: sqlite3.Connection) -> list[Link]:
    """Return the links of a run in their order; none where nobody kept a chain."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'chain'").fetchone():
        return []
    return list(select(connection, Link, "chain", "ORDER BY id"))


def forget(connection: sqlite3.Connection, node: int) -> None:
    """Delete which replies a client gave: links keep leaves that name nobody."""
    if kept(connection):
        for table in ("replies", *_signed(connection)):
            connection.execute(f"DELETE FROM {table} WHERE node = ?", (node,))


def signatures(connection: sqlite3.Connection) -> tuple[list[Sent], list[Certificate]]:
    """Return what nodes have signed, and by which certificates; nothing where no node had a key."""
    if not _signed(connection):
        return [], []
    columns = "node, digest, kind, signature"
    rows = connection.execute(f"SELECT {columns} FROM signatures ORDER BY node, digest").fetchall()
    return [Sent(*row) for row in rows], list(select(connection, Certificate, "certificates"))


def _signed(connection: sqlite3.Connection) -> tuple[str, ...]:
    """Name the tables of nodes' signatures, which runs of earlier versions have not."""
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'signatures'").fetchone()
    return ("signatures", "certificates") if found else ()


def own_signer(folder: Path) -> Signer:
    """Return the key that lies in a folder; made, with mode 0600, when it is first asked for."""
    if not (folder / KEY).exists():
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        replace_file(folder / KEY, pem, mode=0o600)
    return Signer(signing_key(folder / KEY))


def signing_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        StoreError: the file is missing, cannot be read, or holds no such key.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path} holds no private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise StoreError(f"{path} holds a key of another kind than Ed25519")
    return key


def require_signer(folder: Path, signer: Signer | None) -> None:
    """Refuse to go on with a chain that another key began.

    Args:
        folder: of the run.
        signer: of the federation that conducts it; None takes the run's own key.

    Raises:
        StoreError: says which key is asked for.
    """
    with connect(folder) as connection:
        links = kept(connection)
    if not links:
        return
    began = json.loads(links[0].body)["key"]
    if began != (signer or Signer(signing_key(folder / KEY))).public:
        raise StoreError(
            f"{folder} has a chain of rounds signed with another key ({began[:16]}...): put that {KEY} back, "
            "or begin another run"
        )
