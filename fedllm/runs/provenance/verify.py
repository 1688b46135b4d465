"""Check a run's chain of signed rounds against what lies beside it, with nothing but the folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedllm.certificates import key_in, reply_statement, require_signed
from fedllm.errors import ConfigError, StoreError, WireError
from fedllm.runs import checkpoint, database
from fedllm.runs.database import connect, select
from fedllm.runs.provenance import chain
from fedllm.runs.provenance.chain import BEGIN, EXTEND, RETURN, ROUND, Certificate, Counted, Link, Sent
from fedllm.tensors import fingerprint

__all__ = ["Broken", "Verified", "sentences", "verify"]

_NUMBERS = 10_000
"""Numbers of clients that are tried for a reply of one that was forgotten."""


class Broken(StoreError):
    """The chain, or what it stands for, is not what was signed: names the first link that does not hold."""


@dataclass
class Verified:
    """What a chain says, once every link of it holds.

    Attributes:
        key: public key of all links, in hex.
        authority: whether the federation's authority vouches for it; None where nobody asked.
        links: how many there are.
        head: hash of the last one, by which a chain that was cut at its end is told from the whole one.
        unsigned: last round before the chain began; -1 where it holds all of them.
        rounds: digest of the state after each round that counts, by number.
        left: rounds that were committed and from which the run went back, in order.
        checkpoints: rounds whose checkpoints hold the states that were signed.
        replies: which round counted each reply: (round, link, whether that round still counts), by leaf.
        clients: clients whose replies counted, by leaf; those forgotten are missing.
        certified: clients that have signed every reply that counted as theirs, by certificates of the
            authority; None where nobody asked.
        nameless: replies of clients that were forgotten: who gave them can no longer be shown.
    """

    key: str
    authority: bool | None = None
    links: int = 0
    head: str = ""
    unsigned: int = -1
    rounds: dict[int, str] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    replies: dict[str, tuple[int, int, bool]] = field(default_factory=dict)
    clients: dict[str, int] = field(default_factory=dict)
    certified: list[int] | None = None
    nameless: int = 0

    def counted(self, digest: str) -> dict[str, Any] | None:
        """Return where a reply counted, by the digest that its client logged: None where nowhere.

        ``round``, ``link``, ``node``, and ``counts``: whether the run has gone back behind that round since.
        """
        for node in {*self.clients.values(), *range(_NUMBERS)}:
            if found := self.replies.get(chain.leaf(node, digest)):
                return dict(zip(("round", "link", "counts", "node"), (*found, node), strict=True))
        return None

    def told(self) -> dict[str, Any]:
        """Return it as JSON has it; of the replies how many."""
        known = dataclasses.asdict(self)
        return {**known, "replies": len(self.replies), "clients": sorted(set(self.clients.values()))}


def sentences(found: Verified, counted: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Say what a chain says.

    Args:
        found: the chain.
        counted: what :meth:`Verified.counted` says of a reply that was asked for.
    """
    numbers = sorted(found.rounds)
    span = f"rounds {numbers[0]} to {numbers[-1]}" if numbers else "no round yet"
    yield f"{found.links} links hold: {span}, {len(found.replies)} replies counted"
    if found.unsigned >= 0:
        yield f"rounds up to {found.unsigned} were committed before there was a chain, and nobody signed them"
    if found.left:
        yield f"the run went back, and left committed rounds {', '.join(map(str, found.left))} behind"
    kept = ", ".join(map(str, found.checkpoints)) or "none"
    yield f"checkpoints that hold what was signed: {kept}"
    vouched = (
        "which the federation's authority vouches for" if found.authority else "which nobody vouches for"
    )
    yield f"key {found.key}, {vouched}"
    if found.certified is not None:
        told = ", ".join(map(str, found.certified)) or "none"
        yield f"signed by their own nodes, which the authority has certified: the replies of clients {told}"
    if found.nameless:
        yield f"{found.nameless} replies are of clients that were forgotten: whose they were cannot be shown"
    yield f"last link {found.head}"
    if counted is not None:
        since = "" if counted["counts"] else ", from which the run has gone back since"
        yield f"the reply was counted in round {counted['round']} as client {counted['node']}'s{since}"


def verify(folder: Path, authority: Path | None = None) -> Verified:
    """Check signatures, hashes and order of all links, and rounds, replies and checkpoints against them.

    Args:
        folder: the run's.
        authority: ``ca.pem`` of the federation that must have signed, and whose nodes must have signed each
            reply that counted; without it a key of anybody's is good, and nobody asks for nodes' signatures.

    Raises:
        Broken: names the first link that does not hold.
        StoreError: there is no run, or it keeps no chain.
        ConfigError: ``authority`` is no certificate.
    """
    with connect(folder) as connection:
        connection.execute("BEGIN")  # one moment of a run that may be under way
        links = chain.kept(connection)
        if not links:
            raise StoreError(f"{folder} keeps no chain: a fedllm that signed no rounds conducted it")
        clients = list(select(connection, Counted, "replies"))
        signed, certificates = chain.signatures(connection)
        committed = {record.round: record.state_sha256 for record in database.rounds(connection)}
        configured = chain.configuration(connection)
    found = _chained(folder, links)
    if authority is not None:
        issuer = _issuer(authority)
        _require_authority(folder, json.loads(links[0].body)["certificate"], found.key, authority, issuer)
        found.authority = True
    _require_rounds(folder, found, committed)
    _require_replies(found, clients)
    found.nameless = len(found.replies) - len(found.clients)
    if authority is not None:
        _require_nodes_own(folder, found, clients, _proven(signed, certificates, issuer))
    if json.loads(links[-1].body)["configuration"] != configured:
        raise Broken(f"{folder}: the configuration in run.db is not the one of link {links[-1].id}")
    _require_checkpoints(folder, found)
    return found


@contextmanager
def _naming(folder: Path, number: int) -> Iterator[None]:
    """Let whatever is wrong with a link end in one sentence that names it."""
    try:
        yield
    except Broken as error:
        raise Broken(f"{folder}: link {number} of its chain is broken: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(
            f"{folder}: link {number} of its chain is broken: it is not what fedllm writes"
        ) from error


def _chained(folder: Path, links: list[Link]) -> Verified:
    """Go along the links from the first; return what they say together."""
    found, previous, first = Verified(""), "", dict[str, Any]()
    configured = ""
    for place, link in enumerate(links):
        with _naming(folder, place):
            body = json.loads(link.body)
            first = first or body
            found.key = str(first["key"])
            _require_signed(link, found.key)
            kind = body["kind"]
            if (link.id, body["number"], body["previous"]) != (place, place, previous):
                raise Broken("it does not follow the one before it")
            if body["run"] != first["run"]:
                raise Broken(f"it belongs to another run, {body['run']}")
            if (kind == BEGIN) != (place == 0):
                raise Broken(f"a link of kind {kind!r} cannot stand there")
            if kind in (ROUND, RETURN) and body["configuration"] != configured:
                raise Broken("the configuration is another one than before")
            previous, configured = link.hash, body["configuration"]
            _follow(found, place, kind, body)
    found.links, found.head = len(links), previous
    return found


def _follow(found: Verified, place: int, kind: str, body: dict[str, Any]) -> None:
    """Take one link's word for what it did to the run."""
    number, last = int(body["round"]), max(found.rounds, default=found.unsigned)
    if kind == BEGIN:
        found.unsigned = number
    elif kind == ROUND:
        if number != last + 1 and (last, number) != (-1, 1):
            raise Broken(f"round {number} cannot follow round {last}")
        found.rounds[number] = body["state"]
        found.replies |= {leaf: (number, place, True) for leaf in body["replies"]}
    elif kind == RETURN:
        if number > last:
            raise Broken(f"it goes back to round {number}, and the run had come to round {last}")
        gone = [one for one in sorted(found.rounds) if one > number]
        found.left += gone
        found.unsigned = min(found.unsigned, number)
        found.rounds = {one: state for one, state in found.rounds.items() if one <= number}
        found.replies = {
            leaf: (round, link, counts and round <= number)
            for leaf, (round, link, counts) in found.replies.items()
        }
    elif kind == EXTEND:
        if number != last:
            raise Broken(f"it goes on after round {number}, and the run had come to round {last}")
    else:
        raise Broken(f"its kind {kind!r} is unknown")


def _require_signed(link: Link, key: str) -> None:
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(link.signature), chain.CONTEXT + link.body.encode())
    except InvalidSignature:
        raise Broken("its signature is not that of its text") from None


def _issuer(authority: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(authority.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--authority {authority} is no certificate: {error}") from error


def _require_authority(
    folder: Path, certificate: str, key: str, authority: Path, issuer: x509.Certificate
) -> None:
    with _naming(folder, 0):
        if not certificate:
            raise Broken("a key of the run's own has signed, which no federation's authority vouches for")
        shown = x509.load_pem_x509_certificate(certificate.encode())
        try:
            shown.verify_directly_issued_by(issuer)
        except (InvalidSignature, ValueError, TypeError):
            raise Broken(f"another authority than that of {authority} vouches for its key") from None
        public = shown.public_key()
        if not isinstance(public, Ed25519PublicKey) or public.public_bytes_raw().hex() != key:
            raise Broken("its certificate is of another key")


def _require_replies(found: Verified, clients: list[Counted]) -> None:
    """Compare which client gave which reply with the leaves that were signed."""
    for row in clients:
        leaf = chain.leaf(row.node, row.digest)
        if leaf not in found.replies:
            raise Broken(
                f"link {row.link} of the chain does not hold the reply {row.digest[:16]}... that run.db "
                f"ascribes to client {row.node}"
            )
        found.clients[leaf] = row.node


def _proven(
    signed: list[Sent], certificates: list[Certificate], issuer: x509.Certificate
) -> set[tuple[int, str]]:
    """Return client and digest of each reply that a node has signed by a certificate of the authority's."""
    keys: dict[int, list[ec.EllipticCurvePublicKey]] = {}
    for shown in certificates:
        with suppress(WireError, ValueError):
            key = key_in(bytes.fromhex(shown.certificate), issuer, shown.node)
            keys.setdefault(shown.node, []).append(key)
    found = set()
    for one in signed:
        for key in keys.get(one.node, ()):
            with suppress(WireError, ValueError):
                require_signed(key, reply_statement(one.kind, one.digest), bytes.fromhex(one.signature))
                found.add((one.node, one.digest))
    return found


def _require_nodes_own(
    folder: Path, found: Verified, clients: list[Counted], proven: set[tuple[int, str]]
) -> None:
    """Refuse a reply that counted and that no certified node has signed."""
    for row in clients:
        if (row.node, row.digest) not in proven:
            number, *_ = found.replies[chain.leaf(row.node, row.digest)]
            raise Broken(
                f"{folder}: round {number} counted the reply {row.digest[:16]}... as client {row.node}'s, "
                "and no node with a certificate of the authority has signed it (an earlier fedllm kept no "
                "signatures; a run with --insecure has none)"
            )
    found.certified = sorted({row.node for row in clients})


def _require_rounds(folder: Path, found: Verified, committed: dict[int, str | None]) -> None:
    """Compare the rounds that run.db tells of with those that were signed."""
    for number in sorted(committed.keys() | found.rounds.keys()):
        if number <= found.unsigned and number not in found.rounds:
            continue
        if number not in found.rounds:
            raise Broken(f"{folder}: round {number} has no link, the chain ends before it")
        if committed.get(number) != found.rounds[number]:
            told = "has no such round" if number not in committed else "tells of another state after it"
            raise Broken(f"{folder}: round {number} was signed, and run.db {told}")


def _require_checkpoints(folder: Path, found: Verified) -> None:
    """Compare the tensors of every checkpoint of a signed round with the digest of the state."""
    for number in checkpoint.numbers(folder / "checkpoints"):
        if number not in found.rounds:
            continue
        try:
            tensors = checkpoint.load(folder / "checkpoints", number).groups["tensors"]
        except (StoreError, KeyError) as error:
            if number not in checkpoint.numbers(folder / "checkpoints"):
                continue  # a run that is under way has just let it go
            raise Broken(f"round {number} was signed, and its checkpoint cannot be read: {error}") from error
        if fingerprint(tensors) != found.rounds[number]:
            raise Broken(f"{folder}: the checkpoint of round {number} holds another state than was signed")
        found.checkpoints.append(number)
