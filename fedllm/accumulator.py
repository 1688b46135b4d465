"""Order-free sums: the same accepted replies give the same bits, whatever order they arrive in."""

from __future__ import annotations

import torch

from fedllm.errors import RejectedReply
from fedllm.tensors import Spec, Tensors

__all__ = ["WeightedSum"]

_FRACTION_BITS = 36
_LIMIT = 2.0 ** (62 - _FRACTION_BITS)


class WeightedSum:
    """Sum of integer-weighted tensors in fixed point.

    Each ``weight * value`` is rounded to a multiple of 2^-36 and added in int64, where addition is
    associative; the mean is off by at most 2^-37 / mean weight per element. Memory does not grow with the
    number of replies: 8 bytes per parameter.

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
        self._bound = 0.0
        self._sums = {name: torch.zeros(s.shape, dtype=torch.int64) for name, s in sorted(spec.items())}

    def add(self, tensors: Tensors, weight: int) -> None:
        """Fold one reply in.

        Args:
            tensors: exactly the names and shapes of the spec.
            weight: positive integer, such as a number of examples.

        Raises:
            RejectedReply: the sum could leave the fixed-point range (about 6.7e7); nothing was folded.
        """
        if weight <= 0:
            raise RejectedReply(f"weight {weight} is not positive")
        largest = max((float(t.abs().max()) for t in tensors.values() if t.numel()), default=0.0)
        if not self._bound + largest * weight < _LIMIT:
            raise RejectedReply(f"update reaches {largest:g} with weight {weight}: too large to average")
        self._bound += largest * weight
        for name, total in self._sums.items():
            scaled = tensors[name].to(torch.float64).mul_(float(weight) * 2.0**_FRACTION_BITS)
            total.add_(scaled.round_().to(torch.int64))
        self.weight += weight
        self.count += 1

    def total(self) -> Tensors:
        """Return the weighted sum as float64."""
        scale = 2.0**-_FRACTION_BITS
        return {name: total.to(torch.float64).mul_(scale) for name, total in self._sums.items()}

    def mean(self) -> Tensors:
        """Return the weighted mean in the spec's dtypes; needs at least one reply."""
        return {
            name: total.div_(self.weight).to(self.spec[name].dtype) for name, total in self.total().items()
        }
