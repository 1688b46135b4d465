"""How often a graph of neighbours fails, and how often it hides a client from others that collude: bounds."""

from __future__ import annotations

from math import comb

from fedllm.secagg import graph

__all__ = ["NEIGHBOURHOODS", "chances", "exposed", "failing"]

NEIGHBOURHOODS = ((100, 50, 0.667), (1000, 80, 0.667), (1000, 100, 0.5))
"""Clients, neighbours of each, ``privacy.threshold``."""


def chances(clients: int, neighbours: int, share: float) -> dict[str, float]:
    """Return what a round risks, by how many leave and how many collude."""
    return {
        "clients": clients,
        "neighbours": neighbours,
        "threshold": share,
        "fails_at_10_percent_gone": failing(clients, neighbours, 0.1, share),
        "fails_at_20_percent_gone": failing(clients, neighbours, 0.2, share),
        "exposes_at_20_percent_colluding": exposed(clients, neighbours, 0.2, share),
        "exposes_at_33_percent_colluding": exposed(clients, neighbours, 0.33, share),
    }


def failing(clients: int, neighbours: int, gone: float, share: float) -> float:
    """Bound the chance that some client's shares cannot be put together, by all clients' chances added up.

    Args:
        clients: of a round.
        neighbours: of each.
        gone: share of the clients that leave after they have shared, whoever they are.
        share: ``privacy.threshold``.
    """
    holders = neighbours + 1
    return _tail(clients, round(gone * clients), holders, holders - graph.quorum(holders, share) + 1)


def exposed(clients: int, neighbours: int, bad: float, share: float) -> float:
    """Bound the chance that colluding clients hold enough shares of some honest one, likewise.

    Args:
        clients: of a round.
        neighbours: of each.
        bad: share of the clients that tell the server what they know.
        share: ``privacy.threshold``.
    """
    return _tail(clients, round(bad * clients), neighbours, graph.quorum(neighbours + 1, share))


def _tail(clients: int, marked: int, drawn: int, least: int) -> float:
    """Return ``clients`` times the chance that so many of the drawn, or more, are marked; at most 1."""
    ways = sum(
        comb(marked, n) * comb(clients - marked, drawn - n) for n in range(least, min(marked, drawn) + 1)
    )
    return min(1.0, clients * ways / comb(clients, drawn))
