"""Two estimates of one step, and how much of each: updates of clients that train, slopes of those that probe.

    u      =  sum_k p_k u_k                          k trains, p_k = n_k / sum n
    L^2    =  sum_k p_k ||u_k||^2                    how long one client's update is
    V      =  (L^2 - ||u||^2) P2 / (1 - P2)          P2 = sum p_k^2: the variance of u, as clients differ
    d      = -sum_j q_j mean_i c_ji v_ji / r_j       j probes, q_j = n_j / sum n, r_j^2 = mean_i c_ji^2
    E      =  sum_j q_j^2 (D - 1) / P_j              the error of d, of D values and P_j directions

    step   =  u + a (L d - u),      a = V / max(V + L^2 E, ||L d - u||^2)

For directions with E[v v'] = I, mean_i c_i v_i is the gradient g with an error of (D - 1) / P times ||g||^2
(exactly for entries of +-1), and mean_i c_i^2 estimates ||g||^2. So L d is what a client would send that goes
as far as the others, straight down its own gradient. It is no unbiased estimate of u: local steps of AdamW
leave the gradient, and other clients have other texts. Hence the distance in the denominator: it grows with
whatever d is wrong by, noise or bias. With that denominator alone this is the estimator of Green and
Strawderman (JASA 1991) for an unbiased estimate beside one that may be biased by anything, which is in the
mean no further from what u estimates than u itself, whatever the bias, if u's errors are normal and alike in
all of many directions. V + L^2 E is what the distance cannot be expected to fall below.

Of one client that trains nothing says how far others are: V is then ||u||^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from strategies.forward.cohort import Cohort
from strategies.forward.directions import Direction, Kind, combine
from strategies.forward.vectors import Flat

__all__ = ["Spread", "descent", "error", "share_of_probes", "square"]


def square(flat: Flat) -> float:
    """Return the squared L2 norm, summed in one order whatever the number of threads.

    >>> square(np.array([3.0, 4.0]))
    25.0
    """
    return float(np.sum(flat * flat))


@dataclass
class Spread:
    """How long clients' updates are, and how far apart.

    Attributes:
        texts: by node, its weight.
        squares: by node, the squared L2 norm of its update.
    """

    texts: dict[int, int] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)

    def add(self, node: int, texts: int, squared: float) -> None:
        """Note one client's update."""
        self.texts[node], self.squares[node] = texts, squared

    def shares(self) -> dict[int, float]:
        """Return each client's share of the mean, in the order of their numbers."""
        total = sum(self.texts.values())
        return {node: self.texts[node] / total for node in sorted(self.texts)}

    def length(self) -> float:
        """Return the root mean square of the updates' norms."""
        return math.sqrt(math.fsum(share * self.squares[node] for node, share in self.shares().items()))

    def variance(self, of_mean: float) -> float:
        """Return the estimated variance of the mean update, all values together.

        Args:
            of_mean: the squared norm of the mean.

        >>> two = Spread({0: 1, 1: 1}, {0: 4.0, 1: 0.0})  # updates 2 and 0 of one value: mean 1, variance 2
        >>> round(two.variance(1.0), 12)
        1.0
        """
        concentration = math.fsum(share**2 for share in self.shares().values())
        if len(self.texts) == 1:
            return of_mean
        apart = max(self.length() ** 2 - of_mean, 0.0)
        return apart * concentration / (1.0 - concentration)


def descent(cohort: Cohort, seed: int, values: int, kind: Kind) -> Flat:
    """Return the mean of the clients' steps down their gradients, each expected to be of length 1.

    Args:
        cohort: the slopes of a round.
        seed: of the run; directions come of it.
        values: that a direction has (D).
        kind: distribution of a direction's entries.
    """
    terms: dict[Direction, float] = {}
    for node, share in _shares(cohort).items():
        slopes = cohort.slopes[node].astype(np.float64)
        length = math.sqrt(float(np.mean(slopes**2)))
        for index, slope in enumerate(slopes if length else ()):
            terms[Direction(seed, cohort.round, node, index)] = -share * float(slope) / (length * len(slopes))
    return combine(terms, values, kind)


def error(cohort: Cohort, values: int) -> float:
    """Return the squared error to be expected of :func:`descent`, for directions of ``values`` entries."""
    return math.fsum(
        share**2 * (values - 1) / len(cohort.slopes[node]) for node, share in _shares(cohort).items()
    )


def share_of_probes(variance: float, noise: float, apart: float) -> float:
    """Return how much of the step comes from probes, in [0, 1].

    Args:
        variance: of the mean update (V).
        noise: squared error of what probes say, at the same length (L^2 E).
        apart: squared distance of the two.

    >>> [share_of_probes(*told) for told in ((1.0, 3.0, 2.0), (1.0, 3.0, 10.0), (0.0, 0.0, 0.0))]
    [0.25, 0.1, 0.0]
    """
    return variance / max(variance + noise, apart) if variance else 0.0


def _shares(cohort: Cohort) -> Mapping[int, float]:
    total = sum(cohort.examples.values())
    return {node: cohort.examples[node] / total for node in sorted(cohort.slopes)}
