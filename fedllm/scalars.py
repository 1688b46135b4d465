"""A cohort's slopes: all that a forward-only round sends, and enough to rebuild its gradient.

A record of m clients with P slopes each takes 9 + m (10 + 4 P) bytes, whatever the size of the model.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedllm.directions import Direction, Kind, combine
from fedllm.errors import WireError
from fedllm.forward import Slopes

__all__ = ["Cohort", "gradient", "halves", "pack_cohort", "unpack_cohort"]

_HEAD = struct.Struct("<IIB")
_CLIENT = struct.Struct("<IIH")
_RECORD_VERSION = 1

Flat = npt.NDArray[np.float64]


@dataclass
class Cohort:
    """Slopes of one round.

    Attributes:
        round: from 1.
        slopes: by node, in the order in which its directions are numbered, shape (P,) each.
        examples: by node: its weight in the mean.
    """

    round: int
    slopes: dict[int, Slopes] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)

    def extend(self, node: int, slopes: Slopes, examples: int) -> None:
        """Append a client's further slopes; its directions are numbered on."""
        before = self.slopes.get(node, np.empty(0, dtype=np.float32))
        self.slopes[node] = np.concatenate([before, slopes.astype(np.float32)])
        self.examples[node] = examples

    @property
    def directions(self) -> int:
        """Directions probed by all clients together."""
        return sum(len(slopes) for slopes in self.slopes.values())


def pack_cohort(cohort: Cohort) -> bytes:
    """Lay a cohort out in node order, little-endian.

    >>> len(pack_cohort(Cohort(3, {7: np.zeros(10, dtype=np.float32)}, {7: 178})))
    59
    """
    parts = [_HEAD.pack(cohort.round, len(cohort.slopes), _RECORD_VERSION)]
    for node in sorted(cohort.slopes):
        slopes = cohort.slopes[node]
        parts += [_CLIENT.pack(node, cohort.examples[node], len(slopes)), slopes.astype("<f4").tobytes()]
    return b"".join(parts)


def unpack_cohort(record: bytes) -> Cohort:
    """Invert :func:`pack_cohort`; raises ``WireError`` unless the record is exactly what its counts say."""
    try:
        number, clients, version = _HEAD.unpack_from(record)
        if version != _RECORD_VERSION:
            raise WireError(f"a record of slopes has version {version}, this program reads {_RECORD_VERSION}")
        cohort, offset = Cohort(number), _HEAD.size
        for _ in range(clients):
            node, examples, count = _CLIENT.unpack_from(record, offset)
            offset += _CLIENT.size
            slopes = np.frombuffer(record, dtype="<f4", count=count, offset=offset).astype(np.float32)
            offset += 4 * count
            cohort.extend(node, slopes, examples)
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
        for index in indices:
            share = cohort.examples[node] / (total * len(indices))
            terms[Direction(seed, cohort.round, node, index)] = float(cohort.slopes[node][index]) * share
    return combine(terms, entries, kind)
