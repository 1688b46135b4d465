"""What clients tell of themselves in one exchange, as one number for all, and how far it lies apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fedllm.measures import judged, measure
from fedllm.protocol.wire import Reply
from fedllm.sums import weighted_mean
from fedllm.tasks.metrics import spread

__all__ = ["averages", "most_spent", "spreads"]


def averages(replies: Mapping[int, Reply], alone: Iterable[str] = ()) -> dict[str, float]:
    """Average every metric that all replies carry, weighted by examples; a perplexity is that of its loss.

    Args:
        replies: by client.
        alone: metrics that count for each client alone; see :attr:`fedllm.tasks.base.Task.alone`.
    """
    names = set.intersection(*(set(reply.metrics) for reply in replies.values())) if replies else set()
    found = {
        name: weighted_mean((reply.metrics[name], reply.examples) for reply in replies.values())
        for name in sorted(names - {"peak_rss_bytes", "epsilon", "delta", *alone})
    }
    for name in found:
        if name.endswith("perplexity"):
            found[name] = math.exp(min(found[name.replace("perplexity", "loss")], 700.0))
    return found


def most_spent(before: tuple[float, float], replies: Iterable[Reply]) -> tuple[float, float]:
    """Return the largest epsilon and delta that clients have told of their own texts.

    >>> most_spent((1.0, 1e-3), [Reply(1, 0, 5, {"epsilon": 2.0, "delta": 1e-4})])
    (2.0, 0.001)
    """
    epsilon, delta = before
    for reply in replies:
        epsilon = max(epsilon, reply.metrics.get("epsilon", 0.0))
        delta = max(delta, reply.metrics.get("delta", 0.0))
    return epsilon, delta


def spreads(replies: Mapping[int, Reply], first: str) -> dict[str, dict[str, float]]:
    """Say of each metric how differently clients fare, see :func:`fedllm.tasks.metrics.spread`.

    Args:
        replies: by client; numbers that are no metrics are passed over.
        first: the metric that decides.
    """
    told = [reply.metrics for reply in replies.values()]
    names = judged({name for metrics in told for name in metrics}, first)
    return {
        name: spread([own[name] for own in told if name in own], higher=measure(name).higher)
        for name in names
    }
