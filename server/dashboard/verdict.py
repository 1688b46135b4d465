"""The three questions of whoever looks for ten seconds: is it running well, who is slow, what did it cost?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from fedllm.wording import human_bytes, human_seconds, number, times
from server.dashboard.shelf import Overview
from server.dashboard.totals import NodeTotal

__all__ = ["Verdict", "cost", "health", "phase_sentence", "slow", "terms"]

SLOW = 1.5
"""Times the median from which on a node counts as slow."""
QUIET_S = 60.0
"""Seconds without a sign of life that are always forgiven."""


class Verdict(NamedTuple):
    """An answer: ``tone`` is ``good``, ``warn``, ``bad`` or ``idle``; ``detail`` is what it rests on."""

    tone: str
    headline: str
    detail: str


def health(run: Overview, now: float | None = None) -> Verdict:
    """Is it running well?"""
    ended = {
        "failed": ("bad", "Failed", run.reason or "no reason was recorded"),
        "unreadable": ("bad", "Cannot be read", run.reason),
        "interrupted": ("bad", "Interrupted", "its process is gone; resume goes on at the last checkpoint"),
        "stopped": ("idle", "Stopped", f"after round {run.round} of {run.rounds}; it can be resumed"),
        "finished": ("good", "Finished", f"{run.rounds} rounds in {human_seconds(run.seconds)}"),
        "paused": ("warn", "Paused", f"after round {run.round} of {run.rounds}; resume goes on"),
    }
    if run.state in ended:
        return Verdict(*ended[run.state])
    quiet = (time.time() if now is None else now) - run.changed_at
    if quiet > max(QUIET_S, 5 * (run.round_seconds or 0.0)):
        return Verdict("bad", "No progress", f"nothing has happened for {human_seconds(quiet)}")
    lost = run.failures + run.rejected
    if lost and lost > 0.2 * run.clients * max(run.round, 1):
        return Verdict("warn", "Losing answers", f"{lost} answers failed, came late or were rejected")
    best = (min if run.metric == "perplexity" else max)(run.series, default=None)
    if best is not None and run.metric == "accuracy" and run.series[-1] < best - 0.1:
        return Verdict("warn", "Accuracy is falling", f"{number(run.series[-1])} now, {number(best)} at best")
    return Verdict("good", "Running well", phase_sentence(run))


def slow(nodes: Sequence[NodeTotal]) -> Verdict:
    """Who is slow? Whoever takes half as long again as the median, computing and transferring."""
    taken = {
        node.node: node.compute_seconds + (node.transfer_seconds or 0.0)
        for node in nodes
        if node.compute_seconds is not None
    }
    if len(taken) < 2:
        return Verdict("idle", "Too early to say", "no two nodes have answered yet")
    middle = median(taken.values())
    slowest = sorted(taken, key=taken.__getitem__, reverse=True)
    behind = [node for node in slowest if taken[node] > SLOW * middle and taken[node] - middle > 0.05]
    spread = f"median {human_seconds(middle)}, slowest {human_seconds(taken[slowest[0]])} an answer"
    if not behind:
        return Verdict("good", "Nobody", spread)
    shown = ", ".join(f"node {node}" for node in behind[:3])
    more = f" and {len(behind) - 3} more" if len(behind) > 3 else ""
    return Verdict("warn", f"{shown}{more}".capitalize(), spread)


def cost(run: Overview) -> Verdict:
    """What did it cost?"""
    moved = run.bytes_up + run.bytes_down
    if not moved:
        return Verdict("idle", "Nothing yet", "no message has crossed")
    parts = [f"up {human_bytes(run.bytes_up)}, down {human_bytes(run.bytes_down)}"]
    if run.reference_bytes > 1.05 * moved:
        parts.append(f"{times(run.reference_bytes / moved)} less than the whole model")
    if run.dense_up + run.dense_down > 1.05 * moved:
        parts.append(f"codecs save {times((run.dense_up + run.dense_down) / moved)}")
    if run.epsilon is not None:
        parts.append(f"epsilon {number(run.epsilon, 3)} of privacy")
    parts.append(human_seconds(run.seconds))
    return Verdict("good", human_bytes(moved), "; ".join(parts))


def phase_sentence(run: Overview) -> str:
    """Say what a live run is doing, such as "round 3: fit, 3 of 5 answers"."""
    phase = run.phase
    parts = [f"round {phase['round']}"] if phase.get("round") else []
    said = str(phase.get("name") or "starting")
    if "need" in phase:
        unit = "clients" if "clients" in said else "answers"
        said += f", {phase.get('have', 0)} of {phase['need']} {unit}"
    return ": ".join([*parts, said])


def terms(run: Overview, quorum: int, deadline_s: float, now: float | None = None) -> str:
    """Say how many answers a round needs, and how long it waits for them.

    >>> live = Overview(name="a", state="running", phase={"name": "fit", "closes_at": 100.0})
    >>> terms(live, 3, 600.0, now=52.0), terms(Overview(name="a", state="finished"), 3, 600.0)
    ('quorum 3, deadline in 48 s', 'quorum 3, deadline 10 min')
    """
    closes = run.phase.get("closes_at")
    if run.state != "running" or not isinstance(closes, int | float):
        return f"quorum {quorum}, deadline {human_seconds(deadline_s)}"
    left = max(0, round(closes - (time.time() if now is None else now)))
    return f"quorum {quorum}, deadline in {f'{left} s' if left < 60 else human_seconds(left)}"
