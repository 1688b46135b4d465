"""What both sides must agree on in a session, and what each client holds the server to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from fedllm.config import RunConfig
from fedllm.errors import WireError
from fedllm.secagg import graph
from fedllm.secagg.letters import Entry, roster

__all__ = ["LEAST", "Group", "Rules", "fewest", "purpose", "task"]

LEAST = 3
"""Clients in a sum at least: of two, each would know the other's update."""


@dataclass(frozen=True)
class Rules:
    """What a run's configuration says of its sessions.

    Attributes:
        share: of those who take part, more than this must stay to the end; at least 0.5, so that no secret's
            shares suffice for it and for its counterpart.
        degree: neighbours of each client, even; None for all others.
        least: clients without which there is no session.
    """

    share: float
    degree: int | None
    least: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Return a run's rules."""
        return cls(config.privacy.threshold, config.privacy.neighbours, config.quorum)

    def group(self, members: Mapping[int, Entry]) -> Group:
        """Return the session's clients and who of them masks against whom.

        Raises:
            WireError: they are too few.
        """
        if len(members) < max(self.least, LEAST):
            raise WireError(f"{len(members)} clients are too few to hide one among; it takes {self.least}")
        return Group(self, dict(members), hashlib.sha256(roster(members)).digest())


@dataclass(frozen=True)
class Group:
    """The clients of a session.

    Attributes:
        rules: of the run.
        members: everybody's keys.
        digest: SHA-256 of all keys: what everybody signs, and what the graph is drawn by.
    """

    rules: Rules
    members: Mapping[int, Entry]
    digest: bytes

    def neighbours(self, client: int) -> list[int]:
        """Return who masks against a client and holds shares of its secrets, ascending."""
        return graph.neighbours(sorted(self.members), client, self.rules.degree, self.digest)

    def threshold(self, client: int) -> int:
        """Return how many shares give a client's secrets: it holds one itself."""
        return graph.quorum(len(self.neighbours(client)) + 1, self.rules.share)

    @property
    def quorum(self) -> int:
        """Clients who must stay."""
        return max(graph.quorum(len(self.members), self.rules.share), self.rules.least, LEAST)

    def require(self, clients: Sequence[int], client: int, whole: Sequence[int]) -> list[int]:
        """Return a client's neighbours among those who are left, if these are enough.

        Args:
            clients: who is left.
            client: who asks; one of them.
            whole: of whom they are left.

        Raises:
            WireError: they are too few, or not among those.
        """
        here = set(clients)
        if client not in here or not here <= set(whole):
            raise WireError("a list of clients leaves out the one that is asked, or names strangers")
        near = [each for each in self.neighbours(client) if each in here]
        for left, least, whom in (
            (len(clients), self.quorum, f"of {len(self.members)} clients"),
            # Whom these alone are connected with has a sum of its own, which must not be one of two.
            (len(near) + 1, max(self.threshold(client), LEAST), "holders of this client's shares"),
        ):
            if left < least:
                raise WireError(f"{left} {whom} are left, {least} is the least (privacy.threshold)")
        return near


def fewest(config: RunConfig) -> int:
    """Return how few clients a sum may be of: each of them sees to it before it helps to open the sum."""
    return max(config.quorum, LEAST)


def task(
    config: str,
    kind: str,
    arguments: Mapping[str, object],
    progress: float,
    tensors: str,
    most: int,
    weight: int,
) -> bytes:
    """Digest what a client was told to do: masks cancel among those alone who were told the same.

    A server that has one client train as said, and the others on a model or with settings under which their
    updates are nothing, would otherwise see the one in the sum (Pasquini et al., CCS 2022).

    Args:
        config: the run's, as JSON.
        kind: of the exchange.
        arguments: of the exchange.
        progress: share of the rounds that is done.
        tensors: SHA-256 of the global tensors that the client has started from.
        most: texts that one client counts for at most.
        weight: that all have at most.
    """
    told = [config, kind, dict(arguments), progress, tensors, most, weight]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()


def purpose(kind: str, context: str, *clients: int) -> bytes:
    """Name what a key is for: one key, one use.

    Args:
        kind: of use.
        context: names the session, its run, round and exchange.
        clients: whose key it is, in the order that the use has.
    """
    return "/".join([kind, context, *map(str, clients)]).encode()
