"""Who is in the federation: Flower's node ids, the clients' own numbers, and the choice of a cohort."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedllm.randomness import stream

__all__ = ["Member", "Roster", "sample"]


@dataclass(frozen=True)
class Member:
    """A client that has introduced itself.

    Attributes:
        node: its number in the federation, from 0; all randomness and all records go by it.
        flower_id: Flower's own identifier, new at every start.
        examples: training texts it holds; no reply may claim more.
        held_out: texts it keeps for evaluation; no evaluation may claim more.
    """

    node: int
    flower_id: int
    examples: int
    held_out: int = 0


@dataclass
class Roster:
    """The clients that have introduced themselves, and those that the operator has set aside.

    Attributes:
        clients: of the run; their numbers are below it.
        members: by number.
        quarantined: numbers set aside.
        declared: texts that each client has said it has, by number; kept over a resume.
    """

    clients: int
    members: dict[int, Member] = field(default_factory=dict)
    quarantined: set[int] = field(default_factory=set)
    declared: dict[int, int] = field(default_factory=dict)

    def strangers(self, online: Iterable[int]) -> list[int]:
        """Return Flower ids that have not introduced themselves."""
        return sorted(set(online) - {member.flower_id for member in self.members.values()})

    def admit(self, member: Member, online: Iterable[int]) -> str:
        """Take a client in, or say why not.

        A number whose holder is still online is not given away; one whose holder has gone is a client that
        came back under a new Flower id.
        """
        if not 0 <= member.node < self.clients:
            return f"there is no client {member.node} in a run with clients = {self.clients}, numbered from 0"
        holder = self.members.get(member.node)
        if holder is not None and holder.flower_id != member.flower_id and holder.flower_id in set(online):
            return f"client number {member.node} is already taken by a node that is online"
        self.members[member.node] = member
        self.declared[member.node] = member.examples
        return ""

    def number_of(self, flower_id: int) -> int:
        """Return the number of the client behind a Flower id; it must have been admitted."""
        return next(node for node, member in self.members.items() if member.flower_id == flower_id)

    def available(self, online: Iterable[int]) -> list[int]:
        """Return the numbers of clients that are online and not quarantined, ascending."""
        ids = set(online)
        return sorted(n for n, m in self.members.items() if m.flower_id in ids and n not in self.quarantined)


def sample(available: list[int], size: int, seed: int, *when: int) -> list[int]:
    """Choose ``size`` clients uniformly, without replacement: a function of seed, round and who is there.

    Args:
        available: their numbers, ascending.
        size: how many, if there are as many.
        seed: of the run.
        when: the round; and how often it has been chosen in it, after the first time.

    >>> sample([0, 1, 2, 3], 2, 0, 1) == sample([0, 1, 2, 3], 2, 0, 1)
    True
    """
    if len(available) <= size:
        return list(available)
    chosen = stream(seed, "sample", *when).choice(len(available), size=size, replace=False)
    return sorted(available[int(index)] for index in chosen)
