"""Order-free sums: the same replies are taken and give the same bits, whatever order they arrive in."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from functools import cache

import torch

from fedllm.errors import RejectedReply
from fedllm.tensors import Spec, Tensors

__all__ = ["FRACTION_BITS", "LARGEST", "WeightedSum", "in_units", "weighted_mean"]

LARGEST = 2.0**61
"""A reply is refused from here on: the largest ``weight * |value|`` in it, about 2.3e18."""

FRACTION_BITS = 36
"""Of the unit of sums."""
_WORD_BITS = 61
_PIECE = 2**16
"""Values that are added at a time."""
_SMALL = 2.0 ** (_WORD_BITS - 1 - FRACTION_BITS)
"""Replies below this, about 1.7e7, fit the low words as they are."""


class WeightedSum:
    """Sum of integer-weighted tensors in fixed point.

    Each ``weight * value`` is rounded to a multiple of 2^-36 and added to integers, whose addition is
    associative; the mean is off by at most 2^-37 / mean weight per element (and by float64's own rounding
    where ``weight * value`` exceeds 2^17). What a reply may hold does not depend on other replies.

    Memory does not grow with the number of replies: 8 bytes per parameter, and 8 more once sums could exceed
    2^26, about 6.7e7, which 64 bits hold. Two words hold those of 2^27 of the largest replies.

    >>> from fedllm.tensors import TensorSpec
    >>> total = WeightedSum({"w": TensorSpec((2,))})
    >>> total.add({"w": torch.tensor([1.0, 2.0])}, weight=1)
    >>> total.add({"w": torch.tensor([4.0, 5.0])}, weight=2)
    >>> total.mean()["w"].tolist()
    [3.0, 4.0]
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = dict(spec)
        self.weight = 0
        self.count = 0
        self._low = {name: torch.zeros(s.shape, dtype=torch.int64) for name, s in sorted(spec.items())}
        _scratch()  # taken before there is anything to lose
        self._high: Tensors = {}
        """Multiples of 2^61 of the unit; empty until something is carried."""
        self._reach = 0.0
        """Bound on the low words' absolute values, in units of 1."""

    def add(self, tensors: Tensors, weight: int) -> None:
        """Fold one reply in.

        Args:
            tensors: exactly the names and shapes of the spec.
            weight: positive integer, such as a number of examples.

        Raises:
            RejectedReply: ``weight * value`` reaches :data:`LARGEST` or is not finite; nothing was folded.
            MemoryError: or torch's own; nothing was folded.
        """
        if weight <= 0:
            raise RejectedReply(f"weight {weight} is not positive")
        largest = max((float(t.abs().max()) for t in tensors.values() if t.numel()), default=0.0)
        reach = largest * weight
        if not reach < LARGEST:
            raise RejectedReply(f"update reaches {largest:g} with weight {weight}: too large to average")
        if reach >= _SMALL or self._reach + reach >= 4 * _SMALL:
            self._carry()
        flat = {name: tensors[name].reshape(-1) for name in self._low}  # may copy: from here on nothing does
        for name, low in self._low.items():
            high = self._high[name] if reach >= _SMALL else None
            _scratch().add(flat[name], float(weight) * 2.0**FRACTION_BITS, low, high)
        self._reach += min(reach, _SMALL)
        self.weight += weight
        self.count += 1

    def add_total(self, total: Tensors, fraction: int, weight: int, count: int) -> None:
        """Fold a sum of replies in, as if each had been: what :func:`in_units` made of them, added up.

        Args:
            total: int64, exactly the names and shapes of the spec.
            fraction: of their unit, 2^-fraction; at most that of sums.
            weight: of the replies together.
            count: how many they were.
        """
        shift = FRACTION_BITS - fraction
        bits = _WORD_BITS - shift
        self._carry()
        for name, low in self._low.items():
            above, rest = _split(total[name], bits)
            low.add_(rest.bitwise_left_shift_(shift))
            self._high[name].add_(above)
        self._reach += _SMALL
        self.weight += weight
        self.count += count

    def _carry(self) -> None:
        """Move what exceeds half a word from the low words to the high ones."""
        for name, low in self._low.items():
            above, rest = _split(low)
            low.copy_(rest)
            self._high[name] = self._high[name].add_(above) if name in self._high else above
        self._reach = _SMALL

    def total(self) -> Tensors:
        """Return the weighted sum as float64."""
        found: Tensors = {}
        for name, low in self._low.items():
            # Split anew, so that it does not matter when something was carried.
            above, rest = _split(low)
            high = above + self._high[name] if name in self._high else above
            found[name] = rest.double().mul_(2.0**-FRACTION_BITS)
            found[name].add_(high.double(), alpha=2.0 ** (_WORD_BITS - FRACTION_BITS))
        return found

    def mean(self) -> Tensors:
        """Return the weighted mean in the spec's dtypes; needs at least one reply."""
        return {
            name: total.div_(self.weight).to(self.spec[name].dtype) for name, total in self.total().items()
        }


class _Scratch(threading.local):
    """Each thread's room for one piece of a tensor, taken once: where memory runs out, no sum is half made.

    Pieces that stay in a processor's cache are also faster than whole tensors.
    """

    def __init__(self) -> None:
        self._scaled, self._above = (torch.empty(_PIECE, dtype=torch.float64) for _ in range(2))
        self._whole = torch.empty(_PIECE, dtype=torch.int64)

    def add(self, flat: torch.Tensor, factor: float, low: torch.Tensor, high: torch.Tensor | None) -> None:
        """Add ``factor * flat``, rounded to integers, to low words, and what exceeds them to high ones."""
        low = low.view(-1)
        for start in range(0, flat.numel(), _PIECE):
            piece = slice(start, start + _PIECE)
            size = flat[piece].numel()
            scaled, whole = self._scaled[:size], self._whole[:size]
            scaled.copy_(flat[piece]).mul_(factor).round_()
            if high is not None:
                above = self._above[:size]
                torch.mul(scaled, 2.0**-_WORD_BITS, out=above).round_()
                high.view(-1)[piece].add_(whole.copy_(above))
                scaled.sub_(above.mul_(2.0**_WORD_BITS))
            low[piece].add_(whole.copy_(scaled))


@cache
def _scratch() -> _Scratch:
    return _Scratch()


def weighted_mean(numbers: Iterable[tuple[float, int]]) -> float:
    """Return the mean of (number, weight) pairs, the same in any order: the sum of products is rounded once.

    Args:
        numbers: finite and below 1e300 / weight in magnitude; weights are positive integers.

    >>> weighted_mean([(1.0, 1), (4.0, 2)])
    3.0
    """
    pairs = list(numbers)
    return math.fsum(number * weight for number, weight in pairs) / sum(weight for _, weight in pairs)


def in_units(values: torch.Tensor, weight: int, fraction: int) -> torch.Tensor:
    """Return ``weight * values`` in units of 2^-fraction, rounded to integers as sums round; float64.

    >>> in_units(torch.tensor([0.75]), 2, 1).tolist()
    [3.0]
    """
    return values.double().mul_(float(weight) * 2.0**fraction).round_()


def _split(words: torch.Tensor, bits: int = _WORD_BITS) -> tuple[torch.Tensor, torch.Tensor]:
    """Write integers as ``above * 2^bits + rest``, in one way: rest in [-2^(bits - 1), 2^(bits - 1))."""
    above = words.add(1 << bits - 1).bitwise_right_shift_(bits)
    return above, words - above.bitwise_left_shift(bits)
