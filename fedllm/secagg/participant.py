"""A client's half of secure aggregation (Bonawitz et al., CCS 2017; with ``degree``, Bell et al., CCS 2020).

    keys      draws two key pairs, for sealing and for masking
    shares    draws the seed of its self-mask; shares it and its mask key among its neighbours, sealed
    mask      y_u = x_u + PRG(b_u) + sum_(v > u) PRG(k_uv) - sum_(v < u) PRG(k_uv)   over neighbours
    agree     signs whose values came, where clients have keys of their own: one set in a session
    unmask    of each neighbour ONE share: of the seed if its values came, of its mask key if they did not;
              for the set that it has signed, and once a threshold of those who hold its shares have too

Each step of a session is answered once: the same question again has the same answer, any other is refused. So
a server never gets both shares of one neighbour, nor two differences under one mask. A session that another
one follows is forgotten with its secrets, and one that has ended keeps none. A server may begin a round anew:
a client then masks what it masked before, and helps to open the sum of the same clients, or refuses.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedllm.errors import WireError
from fedllm.secagg import keys, shamir, words
from fedllm.secagg.identity import Identity
from fedllm.secagg.letters import (
    Entry,
    Masking,
    Shares,
    Unmasking,
    entries,
    survivors,
    survivors_in,
)
from fedllm.secagg.rules import Group, Rules, purpose
from fedllm.secagg.words import Words

__all__ = ["NO_SHARE", "Participant", "Vault", "agreement", "pair_key", "self_key"]

NO_SHARE = b"\xff" * shamir.SHARE_BYTES
"""Stands for the share of a neighbour that has sealed none; it is out of a share's range."""


class Vault(Protocol):
    """Where a client keeps what it must not forget between two steps."""

    def load(self) -> bytes | None:
        """Return what was saved last."""
        ...

    def save(self, content: bytes) -> None:
        """Replace it, wholly or not at all."""
        ...


@dataclass
class _Session:
    """What a client keeps of its newest session; bytes as hexadecimal text."""

    context: str
    public: str = ""
    seal: str = ""
    mask: str = ""
    seed: str = ""
    own_share: str = ""
    roster: str = ""
    sharers: list[int] = field(default_factory=list)
    task: str = ""
    """Digest of what it was told to do, which its masks hold."""
    peers: dict[str, str] = field(default_factory=dict)
    """Public keys that its neighbours have proven, by number."""
    asked: dict[str, str] = field(default_factory=dict)
    """Digest of what was asked, by step that was answered."""
    answers: dict[str, str] = field(default_factory=dict)
    summed: dict[str, str] = field(default_factory=dict)
    """Digest of whose sum it has helped to open, by round; in all sessions of the run."""
    masked: dict[str, str] = field(default_factory=dict)
    """Digest of what it has masked, likewise."""

    @property
    def place(self) -> str:
        """Names run and round, which several sessions may be for: one sum is opened in a round."""
        return self.context.rsplit("/", 2)[0]


class Participant:
    """One client.

    Args:
        node: its number.
        rules: of the run.
        identity: proves its keys, and checks its neighbours'.
        vault: of this client and run.
    """

    def __init__(self, node: int, rules: Rules, identity: Identity, vault: Vault) -> None:
        self.node, self.rules, self._identity, self._vault = node, rules, identity, vault

    def keys(self, context: str) -> bytes:
        """Begin a session; return its public keys. Whatever session was before is forgotten.

        Args:
            context: names the session: its run, round, exchange and nonce.
        """
        session = self._load()
        if session is None or session.context != context:
            seal, mask = keys.private_key(), keys.private_key()
            entry = Entry(keys.public_of(seal), keys.public_of(mask))
            before = session or _Session("")
            session = _Session(context, entry.write().hex(), seal.hex(), mask.hex())
            session.summed, session.masked = before.summed, before.masked
            self._save(session)
        return bytes.fromhex(session.public)

    def shares(self, context: str, roster: bytes) -> bytes:
        """Share this client's two secrets among its neighbours.

        Args:
            context: of the session.
            roster: everybody's keys, as the server says.

        Raises:
            WireError: the list is none, or another one was answered already.
        """
        session = self._session(context)
        return self._once(session, "shares", roster, lambda: self._share(session, roster))

    def mask(self, context: str, letter: Masking, values: Words, bits: int, task: bytes = b"") -> Words:
        """Mask values; the same again for the same question.

        Args:
            context: of the session.
            letter: who has shared, and what proves their keys.
            values: modulo 2^bits.
            bits: of the ring.
            task: digest of what the values answer, see :func:`fedllm.secagg.rules.task`.

        Raises:
            WireError: neighbours' keys are not their own, too few are left, or other values were masked.
        """
        session = self._session(context)
        if "unmask" in session.asked:
            raise WireError("this session has ended here, and its secrets are gone")
        group = self._group(session)
        near = group.require(letter.sharers, self.node, list(group.members))
        if len(near) != len(letter.proofs):
            raise WireError(f"{len(letter.proofs)} proofs came for {len(near)} neighbours")
        for each, proof in zip(near, letter.proofs, strict=True):
            key = self._identity.check(each, _statement(context, group, each), proof)
            session.peers[str(each)] = key.hex()
        session.sharers, session.task = list(letter.sharers), task.hex()
        question = letter.write() + task + bytes([bits]) + hashlib.sha256(values.tobytes()).digest()
        self._once(session, "mask", question, partial(_note_values, session, words.signed(values, bits)))
        masked, key = values.copy(), bytes.fromhex(session.mask)
        masked += words.mask(self_key(bytes.fromhex(session.seed), context, self.node), values.size, bits)
        for each in near:
            shared = pair_key(key, group.members[each].mask, context, task, self.node, each)
            if each > self.node:
                masked += words.mask(shared, values.size, bits)
            else:
                masked -= words.mask(shared, values.size, bits)
        return words.reduced(masked, bits)

    def agree(self, context: str, survivors: bytes) -> bytes:
        """Sign whose values came; in this session shares are revealed for no others.

        Args:
            context: of the session.
            survivors: as :func:`fedllm.secagg.letters.survivors` writes them.

        Raises:
            WireError: too few are left, or other survivors were signed already.
        """
        session = self._session(context)
        if "mask" not in session.asked:
            raise WireError("this client is asked whose values came, and has masked nothing")
        group = self._group(session)
        group.require(survivors_in(survivors), self.node, session.sharers)
        statement = agreement(context, group, bytes.fromhex(session.task), survivors)
        return self._once(session, "agree", survivors, lambda: self._identity.state(statement))

    def unmask(self, context: str, letter: Unmasking) -> bytes:
        """Reveal one share of each neighbour that has shared, and of oneself; then forget all secrets.

        Raises:
            WireError: too few are left, too few have signed who they are, or another question was answered
                already.
        """
        session = self._session(context)
        if "mask" not in session.asked:
            raise WireError("this client is asked for shares, and has masked nothing")

        def reveal() -> bytes:
            self._require_agreed(session, letter)
            revealed = self._reveal(session, letter)
            self._require_same_sum(session, letter)
            session.seal = session.mask = session.seed = session.own_share = ""
            return revealed

        return self._once(session, "unmask", letter.write(), reveal)

    def _share(self, session: _Session, roster: bytes) -> bytes:
        members = entries(roster)
        if self.node not in members or members[self.node].write().hex() != session.public:
            raise WireError("a list of keys does not hold this client's own")
        self._identity.admit(members.keys() - {self.node})
        group = self.rules.group(members)
        near, threshold = group.neighbours(self.node), group.threshold(self.node)
        seed = secrets.token_bytes(shamir.SECRET_BYTES)
        mask, seal = bytes.fromhex(session.mask), bytes.fromhex(session.seal)
        holders = [each + 1 for each in (*near, self.node)]
        parts = [shamir.split(secret, threshold, holders) for secret in (seed, mask)]
        both = {holder - 1: parts[0][holder] + parts[1][holder] for holder in holders}
        sealed = [
            keys.sealed(_seal_key(seal, members[each].seal, session.context, self.node, each), both[each])
            for each in near
        ]
        session.seed, session.own_share = seed.hex(), both[self.node].hex()
        session.roster = roster.hex()
        proof = self._identity.prove(_statement(session.context, group, self.node))
        return Shares(hashlib.sha256(seed).digest(), sealed, proof).write()

    def _reveal(self, session: _Session, letter: Unmasking) -> bytes:
        group = self._group(session)
        group.require(letter.survivors, self.node, session.sharers)
        survivors, sharers = set(letter.survivors), set(session.sharers)
        near = [each for each in group.neighbours(self.node) if each in sharers]
        if len(letter.sealed) != len(near):
            raise WireError(f"{len(letter.sealed)} sealed shares came of {len(near)} neighbours")
        seal = bytes.fromhex(session.seal)
        found = {self.node: bytes.fromhex(session.own_share)}
        for each, content in zip(near, letter.sealed, strict=True):
            key = _seal_key(seal, group.members[each].seal, session.context, each, self.node)
            found[each] = keys.opened(key, content) or 2 * NO_SHARE
        size = shamir.SHARE_BYTES
        return b"".join(
            found[each][:size] if each in survivors else found[each][size:] for each in sorted(found)
        )

    def _require_agreed(self, session: _Session, letter: Unmasking) -> None:
        """Reveal nothing unless enough of those who hold this client's shares were shown the same survivors.

        Of two sets at most one finds so many signatures, unless more collude than the threshold allows.
        """
        if not self._identity.certified:
            return
        written = survivors(letter.survivors)
        if session.asked.get("agree") != hashlib.sha256(written).hexdigest():
            raise WireError("this client is asked for shares, and has not signed these survivors")
        group = self._group(session)
        statement = agreement(session.context, group, bytes.fromhex(session.task), written)
        near = group.neighbours(self.node)
        signed = [
            node
            for node in set(near) & set(letter.survivors) & letter.agreed.keys()
            if self._identity.stated(bytes.fromhex(session.peers[str(node)]), statement, letter.agreed[node])
        ]
        if 1 + len(signed) < group.threshold(self.node):
            raise WireError(
                f"{1 + len(signed)} holders of this client's shares have signed that these clients are left, "
                f"{group.threshold(self.node)} is the least (privacy.threshold)"
            )

    def _require_same_sum(self, session: _Session, letter: Unmasking) -> None:
        """Open one sum of a round: an update is the same each time, and two sums tell what they differ by."""
        digest = hashlib.sha256(repr(letter.survivors).encode()).hexdigest()[:32]
        if session.summed.setdefault(session.place, digest) != digest:
            raise WireError(
                "this client has helped to open this round's sum of other clients before, and of the two a "
                "single update could be told: go on with the same clients, or begin a new run"
            )

    def _group(self, session: _Session) -> Group:
        if "shares" not in session.asked:
            raise WireError("this client has shared nothing yet in this session")
        return self.rules.group(entries(bytes.fromhex(session.roster)))

    def _once(self, session: _Session, step: str, question: bytes, answer: Callable[[], bytes]) -> bytes:
        """Answer a step's question; the same again as before, and no other."""
        digest = hashlib.sha256(question).hexdigest()
        if step not in session.asked:
            session.answers[step] = answer().hex()
            session.asked[step] = digest
            self._save(session)  # before anything is sent
        elif session.asked[step] != digest:
            raise WireError(f"this client has answered another question of step {step!r} in this session")
        return bytes.fromhex(session.answers[step])

    def _session(self, context: str) -> _Session:
        session = self._load()
        if session is None or session.context != context:
            raise WireError("this client is in no such session of secure aggregation, or no longer")
        return session

    def _load(self) -> _Session | None:
        content = self._vault.load()
        return None if content is None else _Session(**json.loads(content))

    def _save(self, session: _Session) -> None:
        self._vault.save(json.dumps(asdict(session)).encode())


def pair_key(private: bytes, public: bytes, context: str, task: bytes, one: int, other: int) -> bytes:
    """Return what two clients' common mask is drawn from: another where they were told other things."""
    return keys.agree(private, public, purpose("mask", context, *sorted((one, other))) + b"/" + task)


def self_key(seed: bytes, context: str, node: int) -> bytes:
    """Return what a client's own mask is drawn from."""
    return keys.derive(seed, purpose("self", context, node))


def agreement(context: str, group: Group, task: bytes, survivors: bytes) -> bytes:
    """Return what each client signs of whose values came: session, keys and task are in it."""
    return purpose("survivors", context) + b"/" + group.digest + hashlib.sha256(task + survivors).digest()


def _seal_key(private: bytes, public: bytes, context: str, sender: int, receiver: int) -> bytes:
    return keys.agree(private, public, purpose("seal", context, sender, receiver))


def _note_values(session: _Session, values: npt.NDArray[np.int64]) -> bytes:
    """Mask one vector in a round: sums of the same clients would tell what another one differs by."""
    digest = hashlib.sha256(values.tobytes()).hexdigest()[:32]
    if session.masked.setdefault(session.place, digest) != digest:
        raise WireError("this client has masked other values in this round before, and masks no second ones")
    return b""


def _statement(context: str, group: Group, node: int) -> bytes:
    return purpose("list", context, node) + b"/" + group.digest
