"""Is what is measured getting worse? One rule for every metric, so that no run diverges in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedllm.measures import Measure, finite, measure
from fedllm.wording import number

__all__ = ["Verdict", "trend"]


class Verdict(NamedTuple):
    """An answer: ``tone`` is ``good``, ``warn``, ``bad`` or ``idle``; ``detail`` is what it rests on."""

    tone: str
    headline: str
    detail: str


def trend(measured: Sequence[tuple[int, Mapping[str, float | None]]]) -> Verdict | None:
    """Say what is getting worse: the worst of it, or None.

    Args:
        measured: number and metrics of every evaluated round, ascending; None stands for NaN and infinities.

    >>> trend([(1, {"loss": 0.5}), (2, {"loss": None})]).headline
    'Diverged'
    >>> trend([(1, {"accuracy": 0.9}), (2, {"accuracy": 0.7})]).headline
    'Accuracy is falling'
    """
    names = sorted({name for _, metrics in measured for name in metrics})
    found = [verdict for name in names if (verdict := _of(name, measured)) is not None]
    return min(found, key=lambda verdict: verdict.tone != "bad", default=None)


def _of(name: str, measured: Sequence[tuple[int, Mapping[str, float | None]]]) -> Verdict | None:
    values = [(round, metrics[name]) for round, metrics in measured if name in metrics]
    known, (round, last) = measure(name), values[-1]
    if last is None or not finite(last):
        return Verdict("bad", "Diverged", f"{known.headline} is not a number in round {round}")
    best = (max if known.higher else min)(value for _, value in values if value is not None and finite(value))
    told = f"{number(last)} now, {number(best)} at best"
    if known.higher:
        return Verdict("warn", f"{known.headline} is falling", told) if last < _falling(known, best) else None
    rising, diverged = _limits(known, best)
    if last > diverged:
        return Verdict("bad", "Diverged", f"{known.headline}: {told}")
    return Verdict("warn", f"{known.headline} is rising", told) if last > rising else None


def _falling(known: Measure, best: float) -> float:
    """Below what a value that should be high is falling."""
    if known.form == "number":  # of no size that is known
        return best - 0.5 * abs(best)
    return best - (10.0 if known.form == "percent" else 0.1)


def _limits(known: Measure, best: float) -> tuple[float, float]:
    """From where on a value that should be low is rising, and from where on it is lost."""
    if known.form == "ratio":  # the exponential of a loss: its ratios are what tells
        return 1.5 * best, 10 * best
    return 2 * best + 0.2, 3 * best + 1
