"""The server's half of secure aggregation: it passes letters on, adds up, and takes the masks off."""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import numpy.typing as npt

from fedllm.errors import RunFailed, WireError
from fedllm.secagg import keys, shamir, words
from fedllm.secagg.identity import require_stated
from fedllm.secagg.letters import NONCE_BYTES, Entry, Masking, Shares, Unmasking, roster, survivors
from fedllm.secagg.participant import NO_SHARE, agreement, pair_key, self_key
from fedllm.secagg.rules import Group, Rules
from fedllm.secagg.words import Words

__all__ = ["Coordinator"]


class Coordinator:
    """One session, step by step; see :mod:`fedllm.secagg.participant`.

    Args:
        rules: of the run.
        place: run, round and exchange; with the nonce, which is drawn here, they name the session.

    Attributes:
        nonce: of the session; a new one for each attempt at a round.
        sharers: who has shared, by number.
        survivors: whose masked values came.
        task: digest of what all of them were told to do, once they were.
    """

    def __init__(self, rules: Rules, place: str) -> None:
        self.rules, self._place = rules, place
        self.nonce = secrets.token_hex(NONCE_BYTES)
        self.sharers: dict[int, Shares] = {}
        self.survivors: set[int] = set()
        self.task = b""
        self._entries: dict[int, Entry] = {}
        self._group: Group | None = None
        self._sum: Words | None = None
        self._bits = 0
        self._near: dict[int, list[int]] = {}
        self._agreed: dict[int, bytes] = {}
        self._revealed: dict[int, dict[int, bytes]] = {}
        """Shares of each client's secret, by holder + 1."""

    @property
    def context(self) -> str:
        """Names the session."""
        return f"{self._place}/{self.nonce}"

    @property
    def group(self) -> Group:
        """The session's clients, who are fixed once they were told of each other.

        Raises:
            WireError: they are too few.
        """
        if self._group is None:
            self._group = self.rules.group(self._entries)
            self._near = {node: self._group.neighbours(node) for node in self._entries}
        return self._group

    def take_keys(self, node: int, payload: bytes) -> None:
        """Take in a client's public keys.

        Raises:
            WireError: nobody could agree on a key with one of them, and no peer would go on.
        """
        entry = Entry.read(payload)
        for public in (entry.seal, entry.mask):
            keys.agree(keys.private_key(), public, b"")
        self._entries[node] = entry

    def roster(self) -> bytes:
        """Return everybody's keys."""
        return roster(self.group.members)

    def take_shares(self, node: int, payload: bytes) -> None:
        """Take in what a client sealed for its neighbours."""
        self.sharers[node] = Shares.read(payload, len(self._near[node]))

    def masking(self, node: int, most: int, weight: int) -> bytes:
        """Return what a client masks by; see :class:`fedllm.secagg.letters.Masking`."""
        proofs = [self.sharers[each].proof for each in self._near[node] if each in self.sharers]
        return Masking(tuple(sorted(self.sharers)), proofs, most, weight).write()

    def take_masked(self, node: int, payload: bytes, count: int, bits: int) -> None:
        """Add a client's masked values up.

        Raises:
            WireError: they are not ``count`` integers modulo 2^bits.
        """
        values = words.unpack(payload, count, bits)
        if self._sum is None:
            self._sum, self._bits = values.copy(), bits
        else:
            self._sum += values
        self.survivors.add(node)

    def agreeing(self) -> bytes:
        """Return whose values came, which each of them is to sign."""
        return survivors(sorted(self.survivors))

    def take_agreement(self, node: int, payload: bytes) -> None:
        """Take in a client's signature under that.

        Raises:
            WireError: it is none that peers would take.
        """
        statement = agreement(self.context, self.group, self.task, self.agreeing())
        require_stated(self.sharers[node].proof, statement, payload)
        self._agreed[node] = payload

    def unmasking(self, node: int) -> bytes:
        """Return whose shares a client is asked for, and those that were sealed for it."""
        sealed = [
            self.sharers[each].sealed[self._near[each].index(node)]
            for each in self._near[node]
            if each in self.sharers
        ]
        agreed = {each: self._agreed[each] for each in self._near[node] if each in self._agreed}
        return Unmasking(tuple(sorted(self.survivors)), sealed, agreed).write()

    def take_unmasking(self, node: int, payload: bytes) -> None:
        """Take in the shares that a client holds.

        Raises:
            WireError: they are not as many as it was asked for.
        """
        owners = [each for each in sorted([*self._near[node], node]) if each in self.sharers]
        size = shamir.SHARE_BYTES
        if len(payload) != len(owners) * size:
            raise WireError(f"{len(owners)} shares are {len(owners) * size} bytes, got {len(payload)}")
        for place, owner in enumerate(owners):
            share = payload[place * size : (place + 1) * size]
            if share != NO_SHARE:
                self._revealed.setdefault(owner, {})[node + 1] = share

    def total(self) -> npt.NDArray[np.int64]:
        """Return the sum of the survivors' values.

        Raises:
            RunFailed: too few shares came of somebody, or they do not fit.
        """
        assert self._sum is not None
        total = self._sum.copy()
        for node in sorted(self.survivors):
            seed = self._secret(node)
            if hashlib.sha256(seed).digest() != self.sharers[node].commitment:
                raise RunFailed(f"the shares of client {node}'s mask do not give what it was drawn from")
            total -= words.mask(self_key(seed, self.context, node), total.size, self._bits)
        for node in sorted(self.sharers.keys() - self.survivors):
            others = [each for each in self._near[node] if each in self.survivors]
            if others:
                self._take_off(total, node, others)
        return words.signed(words.reduced(total, self._bits), self._bits)

    def _take_off(self, total: Words, gone: int, others: list[int]) -> None:
        """Take off the masks that survivors share with one that is gone."""
        private = self._secret(gone)
        if keys.public_of(private) != self.group.members[gone].mask:
            raise RunFailed(f"the shares of client {gone}'s key do not give it")
        for each in others:
            shared = pair_key(private, self.group.members[each].mask, self.context, self.task, gone, each)
            drawn = words.mask(shared, total.size, self._bits)
            if gone > each:
                total -= drawn
            else:
                total += drawn

    def _secret(self, node: int) -> bytes:
        shares, threshold = self._revealed.get(node, {}), self.group.threshold(node)
        if len(shares) < threshold:
            raise RunFailed(
                f"{len(shares)} shares of client {node}'s mask were revealed, and {threshold} are needed "
                "(privacy.threshold): the round's sum stays hidden"
            )
        try:
            return shamir.join({holder: shares[holder] for holder in sorted(shares)[:threshold]})
        except WireError as error:
            raise RunFailed(f"the shares of client {node}'s mask do not belong together") from error
