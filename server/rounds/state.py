"""What a server keeps from one round to the next: the one thing that is saved, and the one that is loaded.

The parts of an engine work on the fields of one :class:`ServerState`; none keeps anything beside it that a
run which goes on would miss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import torch

from fedllm.runs import checkpoint
from fedllm.runs.checkpoint import Checkpoint
from fedllm.tensors import Tensors
from server.rounds import gates
from strategies.base import State

__all__ = ["Flight", "Sent", "ServerState"]


@dataclass
class Sent:
    """What clients have been sent of the global tensors.

    Attributes:
        first: version that the oldest kept increment starts from.
        increments: one per version from ``first`` on; the last leads to the current version.
        known: newest version that each node has confirmed to hold; absent means unknown.
    """

    first: int = 0
    increments: list[bytes] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)


@dataclass
class Flight:
    """A client at work in mode ``async``, and what a simulation knows already of how that ends.

    Attributes:
        begun: round in which it was asked, and version of the global tensors that it began from.
        asked: when, in seconds: simulated ones, or else of the host's monotonic clock.
        flower_id: under which it was asked.
        answer: serialized; empty while it is under way.
        ends: when it answers, leaves or is given up, in the same seconds; once there is an answer.
        status: empty if it answers, else ``late`` or ``failed``, for that ``reason``.
    """

    begun: tuple[int, int]
    asked: float
    flower_id: int
    answer: bytes = b""
    ends: float = 0.0
    status: Literal["", "late", "failed"] = ""
    reason: str = ""


@dataclass
class ServerState:
    """The server's side of a run between two rounds.

    Attributes:
        current: version, global tensors, and what the method remembers.
        completed: rounds committed; -1 before the setup.
        sent: what clients have been sent.
        estimates: receiver state of the uplink codec by client (EF21's); empty for most codecs.
        counted: (round, index) of each client's newest reply that counted.
        declared: texts that each client has said it has.
        quarantined: clients that the operator has set aside.
        usual: how long updates usually are.
        flights: clients at work in mode ``async``, by number; saved are those whose answer is there.
        now: simulated seconds in which rounds overlap; 0 but in mode ``async``.
        moments: what the server optimiser remembers.
        residual: what ``codec.down`` left out of earlier versions.
        clip: of the next round, where it follows the updates; 0 for ``privacy.clip``.
        spent: largest epsilon and delta that a client told of its texts, where it sees to them itself.
    """

    current: State
    completed: int = -1
    sent: Sent = field(default_factory=Sent)
    estimates: dict[int, Tensors] = field(default_factory=dict)
    counted: dict[int, tuple[int, int]] = field(default_factory=dict)
    declared: dict[int, int] = field(default_factory=dict)
    quarantined: set[int] = field(default_factory=set)
    usual: gates.Usual = field(default_factory=gates.Usual)
    flights: dict[int, Flight] = field(default_factory=dict)
    now: float = 0.0
    moments: Tensors = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)
    clip: float = 0.0
    spent: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def begin(cls, initial: Tensors, *, derived: bool = True) -> Self:
        """Return the state of a new run.

        Args:
            initial: the global tensors that it begins with.
            derived: every node derives them for itself, as version 0. Else they are version 1, which no node
                holds before it was sent them whole.
        """
        return cls(State(0, initial)) if derived else cls(State(1, initial), sent=Sent(first=1))

    def save(
        self, folder: Path, *, keep: int = 2, every: int = 0, best: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        """Write the checkpoint of the last completed round below ``folder``; older ones go.

        Args:
            folder: the run's checkpoints.
            keep: newest checkpoints left, at least 1.
            every: also leave those of the rounds that it divides; 0 leaves none of them.
            best: by round, which was the best so far; left beside each that is left.
        """
        increments = {f"{number:06d}": _bytes(data) for number, data in enumerate(self.sent.increments)}
        flights = {node: flight for node, flight in self.flights.items() if flight.answer}
        estimates = {
            f"{node}/{name}": value
            for node, estimate in self.estimates.items()
            for name, value in estimate.items()
        }
        checkpoint.save(
            folder,
            self.completed,
            {
                "tensors": self.current.tensors,
                "memory": self.current.memory,
                "moments": self.moments,
                "residual": self.residual,
                "increments": increments,
                "estimates": estimates,
                "flights": {str(node): _bytes(flight.answer) for node, flight in flights.items()},
            },
            {
                "version": self.current.version,
                "first": self.sent.first,
                "known": self.sent.known,
                "counted": self.counted,
                "declared": self.declared,
                "usual_norm": self.usual.norm,
                "usual_values": self.usual.values,
                "recent_norms": self.usual.recent,
                "quarantined": sorted(self.quarantined),
                "flights": {
                    node: (f.begun, f.asked, f.ends, f.status, f.reason) for node, f in flights.items()
                },
                "now": self.now,
                "clip": self.clip,
                "spent": self.spent,
            },
            keep=keep,
            every=every,
            best=best,
        )

    @classmethod
    def load(cls, saved: Checkpoint) -> Self:
        """Return the state at the end of the round that a checkpoint holds."""
        facts, groups = saved.facts, saved.groups
        estimates: dict[int, Tensors] = {}
        for key, value in groups["estimates"].items():
            node, _, name = key.partition("/")
            estimates.setdefault(int(node), {})[name] = value
        increments = groups["increments"]
        # Checkpoints of before some of these were kept leave them to be learnt again.
        usual = facts.get("usual_norm", 0.0)
        memory, moments = _apart(groups["memory"], "optimizer/")
        memory, residual = _apart(memory, "down/")
        return cls(
            State(facts["version"], groups["tensors"], memory),
            saved.number,
            Sent(
                facts["first"],
                [_data(increments[key]) for key in sorted(increments)],
                _by_node(facts["known"]),
            ),
            estimates,
            {node: (at[0], at[1]) for node, at in _by_node(facts["counted"]).items()},
            _by_node(facts.get("declared", {})),
            set(facts["quarantined"]),
            gates.Usual(
                usual, facts.get("usual_values", gates.ENOUGH if usual else 0), facts.get("recent_norms", [])
            ),
            {
                int(node): Flight((begun[0], begun[1]), asked, 0, _data(groups["flights"][node]), *how)
                for node, (begun, asked, *how) in facts.get("flights", {}).items()
            },
            facts.get("now", 0.0),
            groups.get("moments", moments),
            groups.get("residual", residual),
            facts.get("clip", 0.0),
            (*facts.get("spent", (0.0, 0.0)),),
        )


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _data(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _by_node(facts: Mapping[str, Any]) -> dict[int, Any]:
    return {int(node): value for node, value in facts.items()}


def _apart(memory: Tensors, prefix: str) -> tuple[Tensors, Tensors]:
    """Take out what stood under a prefix in the memory of all, before each owner had a group of its own."""
    owned = {name: value for name, value in memory.items() if name.startswith(prefix)}
    rest = {name: value for name, value in memory.items() if name not in owned}
    return rest, {name.removeprefix(prefix): value for name, value in owned.items()}
