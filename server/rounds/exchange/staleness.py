"""What an update counts for that began some commits ago (FedBuff; Nguyen et al., AISTATS 2022, algorithm 1).

A round of mode ``async`` is one buffer of K answers. With s_k the commits since client k began, n_k its texts
and e the server's learning rate,

    w  <-  w + e sum_k n_k c(s_k) u_k / sum_k n_k          c(s) = (1 + s)^-a, a = 1/2 in the paper, or 1

which is the paper's (1/K) sum_k c(s_k) u_k where all have as many texts. What is stale counts for less, and
the others for no more in its place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fedllm.config import ServerConfig
from strategies.base import Reply

__all__ = ["spread", "weighed", "weight"]


def weight(config: ServerConfig, staleness: int) -> float:
    """Return c, in (0, 1], of an update that began so many commits ago.

    >>> weight(ServerConfig(), 0), weight(ServerConfig(), 3)
    (1.0, 0.5)
    """
    return 1.0 if config.staleness == "constant" else (1.0 + staleness) ** -config.staleness_exponent


def weighed(config: ServerConfig, reply: Reply, staleness: int) -> Reply:
    """Scale a reply's update by its weight; one of weight 1 stays what it is."""
    share = weight(config, staleness)
    if share == 1.0:
        return reply
    return replace(reply, tensors={name: tensor * share for name, tensor in reply.tensors.items()})


def spread(stale: Collection[int]) -> dict[str, float]:
    """Say how stale the answers of a round were.

    >>> spread([0, 1, 3, 0])
    {'staleness_mean': 1.0, 'staleness_max': 3.0}
    """
    return {"staleness_mean": sum(stale) / len(stale), "staleness_max": float(max(stale))} if stale else {}
