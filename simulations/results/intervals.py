"""What repeats over seeds say of a mean: the one computation behind every table, sentence and band."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedllm.extras import require

__all__ = ["Interval", "by_seed", "counted", "interval", "paired"]

_ENOUGH = 3


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval; a single seed has a mean only.

    Nothing is cut off at what a metric can be: an interval that reaches beyond says that there is too little
    to go by.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def means_something(self) -> bool:
        """Whether the interval is worth showing: two values tell next to nothing of how they spread."""
        return self.n >= _ENOUGH

    def to_json(self) -> dict[str, Any]:
        """Return ``mean``, ``low``, ``high``, ``n`` and ``means_something``."""
        told = {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}
        return {**told, "means_something": self.means_something}


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's t interval of the mean (n - 1 degrees of freedom).

    >>> found = interval([1.0, 2.0, 3.0])  # 2 +- 4.3027 / sqrt(3)
    >>> round(found.low, 4), found.mean, round(found.high, 4)
    (-0.4841, 2.0, 4.4841)
    >>> interval([0.5])
    Interval(mean=0.5, low=None, high=None, n=1)
    """
    count, mean = len(values), fmean(values)
    if count < 2:
        return Interval(mean, None, None, count)
    require("scipy", "an interval over several seeds")
    from scipy.stats import t

    half = float(t.ppf(0.5 + confidence / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def by_seed(values: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Return one value per seed: the mean over clients that trained for themselves, which repeat nothing.

    >>> by_seed([(0, 0.5), (0, 1.0), (1, 0.25)])
    {0: 0.75, 1: 0.25}
    """
    found: dict[int, list[float]] = {}
    for seed, value in values:
        found.setdefault(seed, []).append(value)
    return {seed: fmean(own) for seed, own in found.items()}


def paired(reference: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Return the interval of ``other - reference`` over the seeds that both have, or None without any.

    Pairing by seed takes out what the split and the initial values do to both alike.

    >>> paired({0: 0.90, 1: 0.94}, {0: 0.91, 1: 0.95, 2: 0.5}).n
    2
    """
    seeds = sorted(reference.keys() & other.keys())
    return interval([other[seed] - reference[seed] for seed in seeds]) if seeds else None


def counted(seeds: Sequence[int]) -> str:
    """Say how many seeds, and how many clients of each, the runs of a setting stand for; one seed a run.

    >>> counted([0]), counted([0, 1, 2]), counted([0, 0, 0, 0]), counted([0, 0, 1, 1])
    ('1 seed', '3 seeds', '4 clients, 1 seed', '2 clients, 2 seeds')
    """
    runs = Counter(seeds)
    said = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
    clients = max(runs.values(), default=1)
    return said if clients == 1 else f"{clients} clients, {said}"
