"""Which of many candidate directions get a forward pass: discriminative sampling, kept unbiased.

FwdLLM (section 3.3) probes the candidates best aligned with the previous global gradient, the guide, and
thereby biases its estimate towards it. Here P of M candidates are drawn with probabilities q proportional
to the size of their cosine plus the mean size, and weighted by 1 / (M q). The mean of the weighted forward
gradients then expects to be that of all M, and so the gradient. Adding the mean (a defensive mixture,
Hesterberg, 1995) bounds the weights by 2; without it candidates at right angles to the guide would have
weights of infinite variance.

Both ends of a link choose for themselves, so all arithmetic that decides is on integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedllm.randomness import stream
from strategies.forward.directions import Direction, Kind, chunks
from strategies.forward.vectors import Flat

__all__ = ["Choice", "alignments", "choose", "draw"]

_LEVELS = 1 << 14
"""The guide is rounded to so many levels each side of 0. A sum of products with a direction is then exact in
float64, in whatever order it is added up: up to 2^39 signs, or 2^24 Gaussian entries."""
_GRID = {"rademacher": 1, "gaussian": 4096}


@dataclass(frozen=True)
class Choice:
    """Candidates chosen, ascending.

    Attributes:
        indices: of the candidates, shape (P,); one may be chosen twice.
        weights: 1 / (M q) of each, at most 2, shape (P,).
    """

    indices: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]


def choose(guide: Flat, candidates: Sequence[Direction], count: int, kind: Kind = "rademacher") -> Choice:
    """Choose ``count`` of one client's candidates, the same wherever it is done.

    Args:
        guide: the previous global gradient, shape (entries,).
        candidates: the client's, of one round; the first names the random stream.
        count: P.
        kind: distribution of the directions' entries.
    """
    first = candidates[0]
    sizes = np.abs(alignments(guide, candidates, kind))
    start = stream(first.seed, "choice", first.round, first.node, first.index)
    return draw(sizes, count, start)


def alignments(
    guide: Flat, candidates: Sequence[Direction], kind: Kind = "rademacher"
) -> npt.NDArray[np.int64]:
    """Return whole numbers in proportion to the candidates' inner products with the guide, shape (M,)."""
    largest = float(np.abs(guide).max()) or 1.0
    rounded = np.rint(guide / largest * _LEVELS)
    found = np.zeros(len(candidates), dtype=np.float64)
    for place, candidate in enumerate(candidates):
        start = 0
        for chunk in chunks(candidate, len(guide), kind):
            whole = chunk.astype(np.float64) * _GRID[kind]
            found[place] += whole @ rounded[start : start + len(chunk)]
            start += len(chunk)
    return found.astype(np.int64)


def draw(sizes: npt.NDArray[np.int64], count: int, random: np.random.Generator) -> Choice:
    """Draw ``count`` of M indices with expected counts in proportion to size plus mean size.

    Systematic sampling: one random start, then equal steps through the summed sizes, so that no index with
    less than 1 / count of the sum comes twice.

    >>> chosen = draw(np.array([0, 0, 0, 8]), 2, np.random.default_rng(0))
    >>> chosen.indices.tolist(), chosen.weights.tolist()
    ([2, 3], [1.6666666666666667, 0.45454545454545453])
    """
    shares = sizes + int(sizes.sum()) // len(sizes) + 1
    ends = np.cumsum(shares)
    total = int(ends[-1])
    start = int(random.integers(total))
    steps = np.array([(start + i * total) // count for i in range(count)])
    indices = np.searchsorted(ends, steps, side="right")
    weights = np.array([total / (len(sizes) * int(shares[i])) for i in indices])
    return Choice(indices, weights)
