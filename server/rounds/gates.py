"""What a decoded reply must satisfy before it may touch the global tensors, and how much it then counts.

Every bound is decided before an exchange's first reply is folded: from the configuration, from what clients
said when they were admitted, and from rounds that are over. The order of replies decides nothing.

    weight    n_k  <-  min(n_k, max_examples, weight_ratio * median of all clients' numbers of texts)
    norm      reject where ||u_k|| > norm_ratio * usual, or > max_update_norm
              usual: the largest median norm of any round so far; before enough was seen of any, the method's
              own stride times what the uplink's codec makes of a length (random_k lengthens)
    outlier   name, or reject where server.outliers says so, where ||u_k|| is far above recent rounds' median
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

import torch

from fedllm.config import ServerConfig
from fedllm.errors import RejectedReply
from fedllm.tensors import Spec, Tensors, norm_of, spec_of

__all__ = ["ENOUGH", "LARGEST", "Limits", "Usual", "check", "limits", "outweighed"]

LARGEST = 1e18
"""Magnitude of a value beyond which its square no longer fits float32 with room for sums."""

ENOUGH = 16
"""Values that must have been seen before their length says what is usual. Two honest clients that send one
slope each differ by more than ten times in one case of sixteen; of sixteen, in none of a million."""

RECENT = 5
"""Rounds whose norms say what is far outside of them."""

OUTLIER = 'far outside of recent rounds; server.outliers = "name" would let it pass'
"""Ends the reason of an update that was rejected for that."""

_NAMED = 8
"""Clients that a warning names; it counts the others."""


@dataclass
class Usual:
    """How long updates usually are, learnt from round to round.

    Attributes:
        norm: largest median of any round.
        values: that all rounds' updates held besides zeros; :data:`ENOUGH` is as good as more.
        recent: norms of each of the last :data:`RECENT` rounds, ascending.
    """

    norm: float = 0.0
    values: int = 0
    recent: list[list[float]] = field(default_factory=list)

    @property
    def known(self) -> bool:
        """Whether enough was seen."""
        return self.values >= ENOUGH

    def learn(self, norms: Sequence[float], values: int) -> None:
        """Take in the updates that counted in one round.

        Args:
            norms: of each.
            values: of all together, besides zeros.
        """
        if norms:
            self.recent = [*self.recent, sorted(norms)][-RECENT:]
        self.norm = max(self.norm, median_low(norms) if norms else 0.0)
        self.values = min(self.values + values, ENOUGH)

    def far(self, deviations: float) -> float | None:
        """Return the norm above which an update is far longer than those of the recent rounds.

        That is ``deviations`` robust standard deviations (1.4826 MAD) above the median, and twice the median
        at least; None while they hold fewer than :data:`ENOUGH` updates.

        >>> Usual(recent=[[1.0] * 8 + [2.0] * 8, [1.5] * 8]).far(6.0)
        5.9478
        """
        norms = [norm for of_round in self.recent for norm in of_round]
        if len(norms) < ENOUGH:
            return None
        middle = median(norms)
        deviation = 1.4826 * median(abs(norm - middle) for norm in norms)
        return max(middle + deviations * deviation, 2 * middle)


@dataclass(frozen=True)
class Limits:
    """What a reply to one exchange may count for at most, and how long its update may be.

    Attributes:
        examples: texts that it counts for at most.
        norm: L2 norm over all tensors together, as the server measures it.
        reason: which key sets the norm, and what to do about it.
    """

    examples: int
    norm: float = math.inf
    reason: str = ""


def limits(
    config: ServerConfig,
    declared: Collection[int],
    usual: float | None,
    whose: str = "usual",
    far: float | None = None,
) -> Limits:
    """Decide an exchange's bounds.

    Args:
        config: the bounds as configured.
        declared: numbers of texts that clients said they have when they were admitted.
        usual: length that updates usually have; unset where nothing is known of it.
        whose: what to call that length.
        far: length beyond which an update is rejected as an outlier, if any is.

    >>> found = limits(ServerConfig(weight_ratio=3.0), [80, 100, 1_000_000], usual=2.0)
    >>> found.examples, found.norm
    (300, 20.0)
    >>> print(found.reason)
    server.norm_ratio = 10 times the usual 2; raise it if honest updates are longer, or set it to 0
    """
    examples = config.max_examples
    if config.weight_ratio and declared:
        examples = min(examples, max(1, int(config.weight_ratio * median_low(declared))))
    bounds = []
    if config.max_update_norm is not None:
        reason = f"server.max_update_norm = {config.max_update_norm:g}; raise it if honest updates are longer"
        bounds.append((config.max_update_norm, reason))
    if config.norm_ratio and usual:
        reason = (
            f"server.norm_ratio = {config.norm_ratio:g} times the {whose} {usual:.4g}; raise it if honest "
            "updates are longer, or set it to 0"
        )
        bounds.append((config.norm_ratio * usual, reason))
    if far is not None:
        bounds.append((far, f"{far:.4g}, {OUTLIER}"))
    return Limits(examples, *min(bounds, default=(math.inf, "")))


def outweighed(most: int, declared: Mapping[int, int]) -> str:
    """Say of clients that they count for less than they have, which is no longer FedAvg.

    >>> outweighed(300, {4: 1_000}).partition(", and so ")[2].partition(";")[0]
    'client 4 (1,000 texts) for less than it has'
    """
    named = ", ".join(f"{node} ({texts:,} texts)" for node, texts in list(declared.items())[:_NAMED])
    more = f" and {len(declared) - _NAMED:,} more" if len(declared) > _NAMED else ""
    return (
        f"no client counts for more than {most:,} texts (server.weight_ratio, server.max_examples), and "
        f"so client {named}{more} for less than it has; server.weight_ratio = 0 counts every text"
    )


def check(tensors: Tensors, spec: Spec, bounds: Limits) -> float:
    """Let a reply pass or say why not.

    Args:
        tensors: the decoded answer.
        spec: the names, shapes and dtypes that were asked for.
        bounds: of this exchange.

    Returns:
        The L2 norm of all tensors together.

    Raises:
        RejectedReply: names the first gate that the reply fails.
    """
    found = spec_of(tensors)
    for name in sorted(spec.keys() | found.keys()):
        if name not in found or name not in spec:
            raise RejectedReply(f"tensor {name} is {'missing' if name in spec else 'not asked for'}")
        if found[name] != spec[name]:
            raise RejectedReply(f"tensor {name} is {found[name]}, asked for was {spec[name]}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise RejectedReply(f"tensor {name} holds NaN or infinity")
        if tensors[name].numel() and float(tensors[name].abs().max()) > LARGEST:
            raise RejectedReply(
                f"tensor {name} reaches {float(tensors[name].abs().max()):.3g}, no update does"
            )
    norm = norm_of(tensors)
    if norm > bounds.norm:
        raise RejectedReply(f"update norm {norm:.4g} exceeds {bounds.reason}")
    return norm
