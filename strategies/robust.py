"""Averages that a few bad updates cannot carry away, for methods that average updates.

    trimmed_mean  per value: the mean without the floor(b n) largest and smallest     (Yin et al., ICML 2018)
    median        per value: the median                                              (Yin et al., ICML 2018)
    multi_krum    the mean of the n - f updates closest to their n - f - 2 nearest    (Blanchard et al., 2017)
    norm_bound    the weighted mean of updates, each scaled down to a length         (Sun et al., 2019)

b is ``server.byzantine``, n the replies that counted and f = floor(b n). In the first three clients count
alike, whatever texts they claim. Each is a function of the set of updates, whatever their order.

All but ``norm_bound`` with a length given keep a round's updates until it ends, 4 bytes a value and reply.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median_low

import torch

from fedllm.config import ServerConfig
from fedllm.errors import RejectedReply
from fedllm.protocol.uplink import clipped
from fedllm.sums import LARGEST, WeightedSum
from fedllm.tensors import Spec, Tensors, fingerprint, norm_of

__all__ = ["Kept", "average", "keeps"]


def average(config: ServerConfig, spec: Spec) -> WeightedSum | Kept:
    """Return what folds a round's updates, as ``server.robust`` has it.

    Args:
        config: of the server.
        spec: of an update.
    """
    if config.robust == "none":
        return WeightedSum(spec)
    if config.robust == "norm_bound" and config.robust_norm is not None:
        return BoundedSum(spec, config.robust_norm)
    share = config.byzantine
    rules: dict[str, Callable[[list[Tensors]], Tensors]] = {
        "trimmed_mean": lambda kept: trimmed_mean(kept, share),
        "median": median,
        "multi_krum": lambda kept: mean(multi_krum(kept, share)),
    }
    return Kept(spec, rules.get(config.robust))


def keeps(config: ServerConfig) -> bool:
    """Whether a round's updates are kept until it ends."""
    return config.robust not in ("none", "norm_bound") or (
        config.robust == "norm_bound" and config.robust_norm is None
    )


class BoundedSum(WeightedSum):
    """A weighted sum of updates, each of which is scaled down to a length first.

    >>> from fedllm.tensors import spec_of
    >>> total = BoundedSum(spec_of({"w": torch.zeros(2)}), 1.0)
    >>> total.add({"w": torch.tensor([3.0, 4.0])}, weight=1)
    >>> [round(value, 4) for value in total.mean()["w"].tolist()]
    [0.6, 0.8]
    """

    def __init__(self, spec: Spec, most: float) -> None:
        super().__init__(spec)
        self._most = most

    def add(self, tensors: Tensors, weight: int) -> None:
        """Fold one reply in, as :meth:`fedllm.sums.WeightedSum.add` does."""
        super().add(clipped(tensors, norm_of(tensors), self._most), weight)


class Kept:
    """Updates of one round, kept until it ends.

    Args:
        spec: of an update.
        rule: makes one update of several; unset scales each down to the median length and takes the mean.
    """

    def __init__(self, spec: Spec, rule: Callable[[list[Tensors]], Tensors] | None) -> None:
        self.spec, self._rule = dict(spec), rule
        self._kept: list[tuple[str, int, Tensors]] = []

    @property
    def count(self) -> int:
        """Replies folded."""
        return len(self._kept)

    @property
    def weight(self) -> int:
        """Total weight folded."""
        return sum(weight for _, weight, _ in self._kept)

    def add(self, tensors: Tensors, weight: int) -> None:
        """Keep one reply.

        Raises:
            RejectedReply: as :meth:`fedllm.sums.WeightedSum.add`; nothing was kept.
        """
        largest = max((float(t.abs().max()) for t in tensors.values() if t.numel()), default=0.0)
        if weight <= 0 or not largest * weight < LARGEST:
            raise RejectedReply(f"update reaches {largest:g} with weight {weight}: too large to average")
        own = {name: tensors[name].clone() for name in sorted(self.spec)}
        self._kept.append((fingerprint(own), weight, own))

    def mean(self) -> Tensors:
        """Return what the rule makes of the updates, in the spec's dtypes; needs at least one reply."""
        # By content, so that neither arrival nor client numbers decide between equals.
        ordered = sorted(self._kept, key=lambda entry: entry[:2])
        updates = [tensors for _, _, tensors in ordered]
        if self._rule is not None:
            return self._rule(updates)
        total = BoundedSum(self.spec, median_low([norm_of(tensors) for tensors in updates]))
        for _, weight, tensors in ordered:
            total.add(tensors, weight)
        return total.mean()


def mean(updates: list[Tensors]) -> Tensors:
    """Return the mean of updates, per value, in their dtypes; computed in float64."""
    return trimmed_mean(updates, 0.0)


def trimmed_mean(updates: list[Tensors], share: float) -> Tensors:
    """Return per value the mean without the floor(share n) largest and as many smallest.

    Args:
        updates: n of them, each with the same names and shapes.
        share: in [0, 0.5).

    >>> values = [{"w": torch.tensor([v])} for v in (1.0, 2.0, 3.0, 4.0, 100.0)]
    >>> trimmed_mean(values, 0.2)["w"].item()
    3.0
    """
    cut = int(share * len(updates))
    return _by_value(updates, lambda ranked: ranked[cut : len(ranked) - cut].mean(dim=0))


def median(updates: list[Tensors]) -> Tensors:
    """Return the median per value; of an even number the mean of the middle two.

    >>> median([{"w": torch.tensor([v])} for v in (1.0, 2.0, 4.0, 100.0)])["w"].item()
    3.0
    """
    low, high = (len(updates) - 1) // 2, len(updates) // 2
    return _by_value(updates, lambda ranked: (ranked[low] + ranked[high]) / 2)


def _by_value(updates: list[Tensors], rule: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """Apply a rule to the values of each place, ascending along the first dimension, in float64."""
    found: Tensors = {}
    for name, first in updates[0].items():
        ranked = torch.stack([update[name].double() for update in updates]).sort(dim=0).values
        found[name] = rule(ranked).to(first.dtype)
    return found


def multi_krum(updates: list[Tensors], share: float) -> list[Tensors]:
    """Return the n - f updates whose squared distances to their n - f - 2 nearest sum to the least.

    Args:
        updates: n of them, more than 2 f + 2.
        share: of bad ones; f = floor(share n).
    """
    count, bad = len(updates), int(share * len(updates))
    distances = torch.zeros(count, count, dtype=torch.float64)
    for name in updates[0]:
        rows = torch.stack([update[name].reshape(-1) for update in updates]).double()
        for first in range(count):
            distances[first] += (rows - rows[first]).square().sum(dim=1)
    nearest = distances.sort(dim=1).values[:, 1 : count - bad - 1]  # the first is its own, 0
    order = nearest.sum(dim=1).argsort(stable=True)
    return [updates[index] for index in order[: count - bad].tolist()]
