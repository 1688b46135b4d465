"""When a forward-only round has collected enough directions to commit.

Every rule looks at two halves a and b of the directions that came in: independent estimates of one mean
gradient, whose disagreement is noise that further directions would average out (FwdLLM, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedllm.errors import ConfigError
from strategies.forward.vectors import Flat
from strategies.fwdllm.options import Rule

__all__ = ["Gate", "Rule", "half_variance", "signal_to_noise", "stretch"]


@dataclass(frozen=True)
class Gate:
    """The decision between two exchanges of a round.

    Attributes:
        rule: ``fixed`` commits after one exchange, ``ratio`` once the signal-to-noise ratio of all entries
            reaches ``threshold``, ``variance`` (the paper's) once the variance of one tensor falls to it.
        threshold: what the measure is compared to; unused by ``fixed``.
        cap: exchanges after which a round commits whatever was measured.
    """

    rule: Rule
    threshold: float
    cap: int

    def exhausted(self, exchanges: int) -> bool:
        """Whether a round that has asked ``exchanges`` times may not ask again.

        >>> Gate("fixed", 0.1, 4).exhausted(1), Gate("ratio", 0.1, 4).exhausted(3)
        (True, False)
        """
        return exchanges >= (1 if self.rule == "fixed" else self.cap)

    def measure(self, a: Flat, b: Flat, part: slice) -> float:
        """Compare the halves: over all entries (``ratio``), or over ``part`` (``variance``)."""
        return signal_to_noise(a, b) if self.rule == "ratio" else half_variance(a[part], b[part])

    def passes(self, measured: float) -> bool:
        """Whether what was measured is good enough."""
        return measured >= self.threshold if self.rule == "ratio" else measured <= self.threshold


def signal_to_noise(a: Flat, b: Flat) -> float:
    """Return <a, b> / (||a - b||^2 / 4): squared length of the common part over the mean's error.

    For independent halves a and b with the same mean g, <a, b> estimates ||g||^2 and ||a - b||^2 / 4 the
    variance of (a + b) / 2. The ratio has no units: scaling the loss leaves it alone, unlike
    :func:`half_variance`.

    >>> import numpy as np
    >>> signal_to_noise(np.array([3.0, 1.0]), np.array([3.0, -1.0]))
    8.0
    """
    noise = float(((a - b) ** 2).sum()) / 4.0
    return float(a @ b) / noise if noise > 0 else float("inf")


def half_variance(a: Flat, b: Flat) -> float:
    """Return half the mean square by which the halves differ: the rule of the paper's released code.

    It carries the units of the gradient squared, so that a threshold's meaning drifts while training goes on.

    >>> import numpy as np
    >>> half_variance(np.array([1.0, 0.0]), np.array([-1.0, 0.0]))
    1.0
    """
    return float(((a - b) ** 2).mean()) / 2.0


def stretch(tensors: Mapping[str, torch.Tensor], name: str) -> slice:
    """Return where a tensor lies in the flat vector of all, which runs in name order.

    Args:
        tensors: the trained tensors.
        name: one of them; empty takes the last.

    Raises:
        ConfigError: there is no such tensor.

    >>> stretch({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, "")
    slice(6, 10, None)
    """
    name = name or max(tensors)
    if name not in tensors:
        raise ConfigError(f"fwdllm.pacing_tensor = {name!r} is no trained tensor")
    start = sum(tensor.numel() for other, tensor in tensors.items() if other < name)
    return slice(start, start + tensors[name].numel())
