"""The three questions of whoever looks for ten seconds: is it running well, who is slow, what did it cost?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fedllm.runs.totals import NodeTotal
from fedllm.wording import human_bytes, human_seconds, number, times
from server.dashboard.reading.runs import Overview
from server.dashboard.reading.trend import Verdict

__all__ = ["UNUSABLE", "Verdict", "cost", "health", "patience", "phase_sentence", "slow", "terms"]

SLOW = 1.5
"""Times the median from which on a node counts as slow."""
QUIET_S = 60.0
"""Seconds without progress that are always forgiven."""
FIRST_S = 600.0
"""The same before the first round has ended, where nothing says how long it may take."""
PATIENCE_S = 10.0
"""Seconds of waiting for clients that are not worth a word."""
WAITING = "waiting for clients"
UNUSABLE = ("quarantined", "gone", "absent")
"""States of nodes that cannot answer."""


def health(run: Overview, nodes: Sequence[NodeTotal] = (), now: float | None = None) -> Verdict:
    """Is it running well?

    Args:
        run: as it stands.
        nodes: its clients; those that are away or set aside are what a quorum fails for.
        now: Unix time; unset takes the clock.
    """
    ended = {
        "failed": ("bad", "Failed", run.reason or "no reason was recorded"),
        "unreadable": ("bad", "Cannot be read", run.reason),
        "interrupted": ("bad", "Interrupted", "its process is gone; resume goes on at the last checkpoint"),
        "stopped": ("idle", "Stopped", f"after round {run.round} of {run.rounds}; it can be resumed"),
        "paused": ("warn", "Paused", f"after round {run.round} of {run.rounds}; resume goes on"),
    }
    if run.state in ended:
        return Verdict(*ended[run.state])
    if run.state == "finished":
        told = f"{run.round} rounds in {human_seconds(run.seconds)}" + _final(run)
        if run.ended_early:
            told = f"{run.ended_early}; {told}"
        if run.trend is None:
            return Verdict("good", "Finished early" if run.ended_early else "Finished", told)
        return Verdict(
            run.trend.tone, f"Finished: {run.trend.headline.lower()}", f"{told}; {run.trend.detail}"
        )
    now = time.time() if now is None else now
    for found in (_without_quorum(run, nodes), _waiting(run, now), _without_progress(run, now), run.trend):
        if found is not None:
            return found
    lost = run.failures + run.rejected
    if lost and lost > 0.2 * run.clients * max(run.round, 1):
        return Verdict("warn", "Losing answers", f"{lost} answers failed, came late or were rejected")
    return Verdict("good", "Running well", phase_sentence(run))


def _final(run: Overview) -> str:
    return "" if run.value is None else f"; {run.metric} {number(run.value)}"


def _without_quorum(run: Overview, nodes: Sequence[NodeTotal]) -> Verdict | None:
    """Whether fewer nodes are left than a round needs, and why."""
    why = Counter(node.state for node in nodes if node.state in UNUSABLE)
    if not nodes or len(nodes) - sum(why.values()) >= run.quorum:
        return None
    counted = ", ".join(f"{count} {'is' if count == 1 else 'are'} {state}" for state, count in why.items())
    return Verdict(
        "bad", "Cannot train", f"of {len(nodes)} nodes {counted}: a round needs {run.quorum} answers"
    )


def _waiting(run: Overview, now: float) -> Verdict | None:
    since = run.phase.get("since")
    if run.phase.get("name") != WAITING or not isinstance(since, int | float) or now - since < PATIENCE_S:
        return None
    tone = "bad" if now - since > QUIET_S else "warn"
    return Verdict(tone, "Waiting for clients", f"{phase_sentence(run)}, for {human_seconds(now - since)}")


def _without_progress(run: Overview, now: float) -> Verdict | None:
    quiet = now - run.progress_at
    if quiet <= patience(run):
        return None
    return Verdict("bad", "No progress", f"nothing has happened for {human_seconds(quiet)}")


def patience(run: Overview) -> float:
    """Seconds without progress that are still in order: the first round has nothing to be measured by."""
    if run.round_seconds is None:
        closes, since = run.phase.get("closes_at"), run.phase.get("since")
        if isinstance(closes, int | float) and isinstance(since, int | float):
            return QUIET_S + max(0.0, closes - since)
        return FIRST_S
    return max(QUIET_S, 5 * run.round_seconds)


def slow(nodes: Sequence[NodeTotal]) -> Verdict:
    """Who is slow? Whoever is away, misses the deadline, or takes half as long again as the median."""
    away = [node.node for node in nodes if node.state in ("gone", "absent")]
    late = [node.node for node in nodes if node.state == "late"]
    taken = {
        node.node: node.compute_seconds + (node.transfer_seconds or 0.0)
        for node in nodes
        if node.compute_seconds is not None
    }
    middle = median(taken.values()) if taken else 0.0
    slowest = sorted(taken, key=taken.__getitem__, reverse=True)
    spread = (
        f"median {human_seconds(middle)}, slowest {human_seconds(taken[slowest[0]])} an answer"
        if taken
        else ""
    )
    if away or late:
        told = [f"{_named(away)} gone" if away else "", f"{_named(late)} late" if late else "", spread]
        headline = _named(away + late)
        return Verdict("warn", headline[0].upper() + headline[1:], "; ".join(filter(None, told)))
    if len(taken) < 2:
        return Verdict("idle", "Too early to say", "no two nodes have answered yet")
    behind = [node for node in slowest if taken[node] > SLOW * middle and taken[node] - middle > 0.05]
    if not behind:
        return Verdict("good", "Nobody", spread)
    return Verdict("warn", _named(behind).capitalize(), spread)


def _named(nodes: Sequence[int]) -> str:
    shown = ", ".join(f"node {node}" for node in nodes[:3])
    return shown + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")


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
        said += f", {phase.get('have', 0)} of {phase['need']} {unit}" + _loading(phase)
    asked = f"; {', '.join(run.pending)} asked for, obeyed before the next round" if run.pending else ""
    return ": ".join([*parts, said]) + asked


def _loading(phase: Mapping[str, Any]) -> str:
    count, nodes = phase.get("loading", 0), phase.get("loading_nodes", [])
    if not count:
        return ""
    who = _named(nodes) if len(nodes) == count else f"{count} nodes"
    return f"; {who} loading"


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
