"""Who masks against whom: all against all, or each against ``degree`` others (Bell et al., CCS 2020)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

__all__ = ["neighbours", "quorum"]


def neighbours(clients: Sequence[int], client: int, degree: int | None, seed: bytes) -> list[int]:
    """Return a client's neighbours, ascending.

    A Harary graph over an order that the seed decides: each client and the ``degree`` / 2 on either side of
    it on a circle. It is symmetric, and connected whatever fewer than ``degree`` clients are taken away.

    Args:
        clients: all of them.
        client: one of them.
        degree: even; None for all others.
        seed: what no party chooses alone, such as a digest of everybody's fresh keys.

    >>> neighbours([3, 5, 8], 5, None, b"")
    [3, 8]
    """
    if degree is None or degree >= len(clients) - 1:
        return sorted(set(clients) - {client})
    circle = sorted(clients, key=lambda each: hashlib.sha256(seed + each.to_bytes(8)).digest())
    place = circle.index(client)
    steps = [step for reach in range(1, degree // 2 + 1) for step in (-reach, reach)]
    return sorted(circle[(place + step) % len(circle)] for step in steps)


def quorum(holders: int, share: float) -> int:
    """Return how many of the holders of a secret's shares give it back: more than a share of them.

    >>> quorum(10, 2 / 3), quorum(100, 0.5)
    (7, 51)
    """
    return int(share * holders + 1e-9) + 1
