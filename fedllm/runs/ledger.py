"""Exact bytes by round, node, direction, exchange and record.

Whoever serialises a message adds one :class:`Entry` per record of it; nothing here estimates. The sum
over one message's entries is the size of its ``RecordDict`` as protobuf, so framing around the records
has an entry of its own (``record="envelope"`` by convention).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["NOBODY", "Direction", "Entry", "Ledger"]

Direction = Literal["up", "down"]
"""``up`` is client to server, ``down`` is server to client."""

NOBODY = -1
"""Whom the bytes of a forgotten client are counted under: what crossed the network stays true."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Bytes of one record of one message.

    Attributes:
        round: from 1; what crosses before round 1 is round 0.
        node: the client's number in the federation, from 0.
        direction: ``up`` or ``down``.
        exchange: the exchange's kind: ``setup``, ``fit``, ``evaluate``.
        record: name of the record within the message, or ``envelope``.
        bytes: serialized size.
        dense: serialized size of the same record with its tensors as uncompressed fp32; unset where the
            record carries no tensors, which makes it equal to ``bytes``.
    """

    round: int
    node: int
    direction: Direction
    exchange: str
    record: str
    bytes: int
    dense: int | None = None

    @property
    def dense_bytes(self) -> int:
        """Size of the record without a codec."""
        return self.bytes if self.dense is None else self.dense


@dataclass
class _Total:
    bytes: int = 0
    dense: int = 0
    nodes: set[int] = field(default_factory=set)


class Ledger:
    """Running totals of entries; its size grows with rounds and participants, not with messages.

    >>> ledger = Ledger([Entry(0, 0, "up", "setup", "means", 5), Entry(1, 0, "up", "fit", "update", 30, 120)])
    >>> ledger.bytes("up"), ledger.dense("up"), ledger.setup_up, ledger.up_per_client_round
    (35, 125, 5, 30.0)
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._totals: dict[tuple[int, Direction], _Total] = {}
        self.extend(entries)

    def add(self, entry: Entry) -> None:
        """Count one record of one message."""
        total = self._totals.get((entry.round, entry.direction))
        if total is None:
            total = self._totals[entry.round, entry.direction] = _Total()
        total.bytes += entry.bytes
        total.dense += entry.dense_bytes
        total.nodes.add(entry.node)

    def extend(self, entries: Iterable[Entry]) -> None:
        """Count many."""
        for entry in entries:
            self.add(entry)

    def _select(self, direction: Direction, round: int | None) -> list[_Total]:
        return [
            total
            for (number, way), total in self._totals.items()
            if way == direction and round in (None, number)
        ]

    def bytes(self, direction: Direction, round: int | None = None) -> int:
        """Bytes that crossed in one direction, in one round or in all."""
        return sum(total.bytes for total in self._select(direction, round))

    def dense(self, direction: Direction, round: int | None = None) -> int:
        """Bytes of the same messages with their tensors as uncompressed fp32."""
        return sum(total.dense for total in self._select(direction, round))

    @property
    def setup_up(self) -> int:
        """The part of the upload that came before round 1."""
        return self.bytes("up", 0)

    @property
    def up_per_client_round(self) -> float:
        """Upload after setup divided by the (client, round) pairs that sent any; 0 before the first."""
        pairs = sum(
            len(total.nodes) for (round, way), total in self._totals.items() if way == "up" and round > 0
        )
        return (self.bytes("up") - self.setup_up) / pairs if pairs else 0.0

    def truncate(self, after_round: int) -> None:
        """Forget rounds later than ``after_round``."""
        self._totals = {key: total for key, total in self._totals.items() if key[0] <= after_round}
