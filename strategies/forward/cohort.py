"""A cohort's slopes: all that a forward-only round sends, and enough to rebuild its gradient.

A record of m clients with P slopes each takes 9 + m (10 + 4 P) bytes, whatever the size of the model, and
two more bytes per slope where directions were chosen among candidates.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedllm.errors import WireError
from strategies.forward.directions import Direction, Kind, combine
from strategies.forward.slopes import Slopes
from strategies.forward.vectors import Flat

__all__ = ["MOST_INDICES", "MOST_SLOPES", "Cohort", "gradient", "halves", "pack_cohort", "unpack_cohort"]

_HEAD = struct.Struct("<IIB")
_CLIENT = struct.Struct("<IIH")
MOST_SLOPES = 2**16 - 1
"""Slopes of one client that a record holds: their count takes two bytes."""
MOST_INDICES = 2**16
"""Directions that chosen ones may be numbered among: a number takes two bytes."""
_EVERY, _CHOSEN = 1, 2
"""Kinds of record: directions are numbered as they come, or their numbers stand behind the slopes."""

Indices = npt.NDArray[np.int64]


@dataclass
class Cohort:
    """Slopes of one round.

    Attributes:
        round: from 1.
        slopes: by node, shape (P,) each; already weighted where directions were chosen.
        examples: by node: its weight in the mean.
        indices: by node, the numbers of its directions below 2^16; empty where they are 0, 1, ..., P - 1.
    """

    round: int
    slopes: dict[int, Slopes] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)
    indices: dict[int, Indices] = field(default_factory=dict)

    def extend(self, node: int, slopes: Slopes, examples: int, indices: Indices | None = None) -> None:
        """Append a client's further slopes; without ``indices`` its directions are numbered on."""
        before = self.slopes.get(node, np.empty(0, dtype=np.float32))
        after = np.concatenate([before, slopes.astype(np.float32)])
        # Last of all that may fail: slopes and their numbers change together.
        if indices is not None:
            known = self.indices.get(node, np.empty(0, dtype=np.int64))
            self.indices[node] = np.concatenate([known, indices.astype(np.int64)])
        self.slopes[node], self.examples[node] = after, examples

    def numbers(self, node: int) -> Indices:
        """Return the numbers of a client's directions, shape (P,)."""
        return self.indices.get(node, np.arange(len(self.slopes[node])))

    @property
    def directions(self) -> int:
        """Directions probed by all clients together."""
        return sum(len(slopes) for slopes in self.slopes.values())


def pack_cohort(cohort: Cohort) -> bytes:
    """Lay a cohort out in node order, little-endian.

    >>> len(pack_cohort(Cohort(3, {7: np.zeros(10, dtype=np.float32)}, {7: 178})))
    59
    """
    kind = _CHOSEN if cohort.indices else _EVERY
    parts = [_HEAD.pack(cohort.round, len(cohort.slopes), kind)]
    for node in sorted(cohort.slopes):
        slopes = cohort.slopes[node]
        parts += [_CLIENT.pack(node, cohort.examples[node], len(slopes)), slopes.astype("<f4").tobytes()]
        if kind == _CHOSEN:
            parts.append(cohort.numbers(node).astype("<u2").tobytes())
    return b"".join(parts)


def unpack_cohort(record: bytes) -> Cohort:
    """Invert :func:`pack_cohort`; raises ``WireError`` unless the record is exactly what its counts say."""
    try:
        number, clients, kind = _HEAD.unpack_from(record)
        if kind not in (_EVERY, _CHOSEN):
            raise WireError(
                f"a record of slopes is of kind {kind}, this program reads {_EVERY} and {_CHOSEN}"
            )
        cohort, offset = Cohort(number), _HEAD.size
        for _ in range(clients):
            node, examples, count = _CLIENT.unpack_from(record, offset)
            offset += _CLIENT.size
            slopes = np.frombuffer(record, dtype="<f4", count=count, offset=offset).astype(np.float32)
            offset += 4 * count
            indices: Indices | None = None
            if kind == _CHOSEN:
                indices = np.frombuffer(record, dtype="<u2", count=count, offset=offset).astype(np.int64)
                offset += 2 * count
            cohort.extend(node, slopes, examples, indices)
    except (struct.error, ValueError) as error:
        raise WireError(f"a record of slopes is cut short at {len(record)} bytes") from error
    if offset != len(record) or len(cohort.slopes) != clients:
        raise WireError(f"a record of slopes holds {len(record)} bytes, its counts say {offset}")
    return cohort


def gradient(cohort: Cohort, seed: int, entries: int, kind: Kind = "rademacher") -> Flat:
    """Rebuild the mean forward gradient, shape (entries,), the same bits wherever it is rebuilt.

    Clients are averaged (not summed), weighted by their numbers of texts; each client's own forward
    gradients are averaged over its directions.
    """
    return _mean(cohort, cohort.slopes, lambda rank, index: True, seed, entries, kind)


def halves(cohort: Cohort, seed: int, entries: int, kind: Kind = "rademacher") -> tuple[Flat, Flat]:
    """Rebuild two gradients, each from every other direction of each client.

    Both halves see every client's batch, so that they differ by what more directions would cure, and not
    by what the clients' data disagree about. Clients with a single direction are dealt to the halves in turn.
    """

    def half(parity: int) -> Flat:
        return _mean(cohort, cohort.slopes, lambda rank, i: (rank + i) % 2 == parity, seed, entries, kind)

    return half(0), half(1)


def _mean(
    cohort: Cohort,
    nodes: Iterable[int],
    wanted: Callable[[int, int], bool],
    seed: int,
    entries: int,
    kind: Kind,
) -> Flat:
    """Average the forward gradients whose (rank of the client, index of the direction) is wanted."""
    chosen = {
        node: [i for i in range(len(cohort.slopes[node])) if wanted(rank, i)]
        for rank, node in enumerate(sorted(nodes))
    }
    total = sum(cohort.examples[node] for node, indices in chosen.items() if indices)
    terms: dict[Direction, float] = {}
    for node, indices in chosen.items():
        share, numbers = cohort.examples[node] / (total * max(len(indices), 1)), cohort.numbers(node)
        for index in indices:
            direction = Direction(seed, cohort.round, node, int(numbers[index]))
            terms[direction] = terms.get(direction, 0.0) + float(cohort.slopes[node][index]) * share
    return combine(terms, entries, kind)
