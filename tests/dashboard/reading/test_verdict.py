"""The three answers, from situations chosen by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fedllm.runs.totals import NodeTotal
from server.dashboard.reading.runs import Overview
from server.dashboard.reading.trend import trend
from server.dashboard.reading.verdict import cost, health, phase_sentence, slow

NOW = 1000.0


def view(**given: Any) -> Overview:
    base: dict[str, Any] = {
        "name": "a", "state": "running", "clients": 5, "round": 4, "rounds": 10, "progress_at": NOW,
        "series": [0.5, 0.6, 0.7, 0.8], "round_seconds": 2.0, "quorum": 2,
        "phase": {"name": "fit", "round": 5},
    }  # fmt: skip
    return Overview(**(base | given))


def nodes(*states: str) -> list[NodeTotal]:
    return [NodeTotal(node=node, state=state) for node, state in enumerate(states)]


WAITING = {"name": "waiting for clients", "have": 1, "need": 3}
FIRST = {"round": 0, "round_seconds": None, "series": []}
SITUATIONS: list[tuple[dict[str, Any], Sequence[NodeTotal], str, str]] = [
    ({}, (), "good", "Running well"),
    ({"state": "paused"}, (), "warn", "Paused"),
    ({"state": "stopped"}, (), "idle", "Stopped"),
    ({"state": "finished"}, (), "good", "Finished"),
    ({"state": "failed", "reason": "quorum"}, (), "bad", "Failed"),
    ({"state": "interrupted"}, (), "bad", "Interrupted"),
    ({"state": "unreadable"}, (), "bad", "Cannot be read"),
    # Who could train?
    ({}, nodes("ok", "ok", "gone"), "good", "Running well"),
    ({}, nodes("ok", "late", "failing"), "good", "Running well"),
    ({}, nodes("ok", "gone", "gone"), "bad", "Cannot train"),
    ({}, nodes("quarantined", "quarantined", "quarantined"), "bad", "Cannot train"),
    ({}, nodes("ok", "absent", "absent"), "bad", "Cannot train"),
    ({"state": "finished"}, nodes("gone", "gone", "gone"), "good", "Finished"),
    # Does it get on?
    ({"progress_at": NOW - 61}, (), "bad", "No progress"),
    ({"progress_at": NOW - 61, "round_seconds": 20.0}, (), "good", "Running well"),
    ({"progress_at": NOW - 500, **FIRST}, (), "good", "Running well"),
    ({"progress_at": NOW - 601, **FIRST}, (), "bad", "No progress"),
    ({"progress_at": NOW - 900, **FIRST, "phase": {"name": "fit", "since": 100.0, "closes_at": 1000.0}}, (),
     "good", "Running well"),
    ({"progress_at": NOW - 961, **FIRST, "phase": {"name": "fit", "since": 39.0, "closes_at": 939.0}}, (),
     "bad", "No progress"),
    ({"phase": {**WAITING, "since": NOW - 5}}, (), "good", "Running well"),
    ({"phase": {**WAITING, "since": NOW - 30}}, (), "warn", "Waiting for clients"),
    ({"phase": {**WAITING, "since": NOW - 61}}, (), "bad", "Waiting for clients"),
    # Does it get better?
    ({"failures": 3, "rejected": 2}, (), "warn", "Losing answers"),
    ({"failures": 2, "rejected": 2}, (), "good", "Running well"),
    ({"trend": trend([(1, {"accuracy": 0.9}), (2, {"accuracy": 0.79})])}, (), "warn", "Accuracy is falling"),
    ({"trend": trend([(1, {"accuracy": 0.9}), (2, {"accuracy": 0.81})])}, (), "good", "Running well"),
    ({"trend": trend([(1, {"loss": None})])}, (), "bad", "Diverged"),
    ({"state": "finished", "trend": trend([(1, {"loss": None})])}, (), "bad", "Finished: diverged"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "held", "tone", "headline"), SITUATIONS)
def test_is_it_running_well(
    given: dict[str, Any], held: Sequence[NodeTotal], tone: str, headline: str
) -> None:
    assert health(view(**given), held, now=NOW)[:2] == (tone, headline)


@pytest.mark.parametrize(
    ("metric", "values", "headline"),
    [
        ("perplexity", [80.0, 60.0, 82_000.0], "Diverged"),
        ("perplexity", [80.0, 60.0, 95.0], "Perplexity is rising"),
        ("perplexity", [80.0, 60.0, 70.0], None),
        ("loss", [1.6, 0.2, 1.7], "Diverged"),
        ("loss", [1.6, 0.2, 0.7], "Loss is rising"),
        ("loss", [1.6, 0.2, 0.5], None),
        ("loss", [1.6, None, 0.5], None),
        ("loss", [1.6, 0.5, float("nan")], "Diverged"),
        ("macro_f1", [0.8, 0.3], "Macro-F1 is falling"),
        ("bleu", [30.0, 29.5], None),  # of 100
        ("bleu", [30.0, 19.5], "BLEU is falling"),
        ("reward_margin", [4.0, 3.0], None),  # of no size that is known
        ("reward_margin", [4.0, 1.5], "Reward margin is falling"),
        ("rmse", [4.0, 3.0, 9.0], "Root mean squared error is rising"),
        ("accuracy", [], None),
    ],
)
def test_every_metric_has_its_direction(
    metric: str, values: list[float | None], headline: str | None
) -> None:
    found = trend([(number, {metric: value}) for number, value in enumerate(values, 1)])
    assert (found and found.headline) == headline


def test_what_cannot_train_says_why_and_what_is_asked_for_is_told() -> None:
    assert health(view(), nodes("ok", "gone", "gone", "quarantined"), now=NOW).detail == (
        "of 4 nodes 2 are gone, 1 is quarantined: a round needs 2 answers"
    )
    told = health(view(pending=["pause"]), now=NOW).detail
    assert told == "round 5: fit; pause asked for, obeyed before the next round"


def test_a_finished_run_tells_its_quality() -> None:
    run = view(state="finished", round=10, metric="accuracy", value=0.8123, seconds=75.0)
    assert health(run).detail == "10 rounds in 1 min 15 s; accuracy 0.8123"
    early = health(view(state="finished", ended_early="ended after round 4 of 10: why", seconds=75.0))
    assert (early.headline, early.detail) == (
        "Finished early", "ended after round 4 of 10: why; 4 rounds in 1 min 15 s"
    )  # fmt: skip


def test_who_is_slow() -> None:
    def node(number: int, seconds: float | None, state: str = "ok") -> NodeTotal:
        return NodeTotal(node=number, state=state, compute_seconds=seconds, transfer_seconds=0.0)

    assert slow([node(0, 1.0), node(1, None)]).tone == "idle"
    assert slow([node(0, 1.0), node(1, 1.4), node(2, 1.0)]).headline == "Nobody"
    found = slow([node(0, 1.0), node(1, 1.6), node(2, 1.0), node(3, 5.0), node(4, 1.0)])
    assert (found.tone, found.headline) == ("warn", "Node 3, node 1")
    assert "median 1.00 s, slowest 5.00 s" in found.detail
    # Who is away, or never in time, has nothing to be measured by, and is slowest of all.
    found = slow([node(0, 1.0), node(1, None, "gone"), node(2, 1.0), node(3, None, "late")])
    assert (found.tone, found.headline) == ("warn", "Node 1, node 3")
    assert found.detail == "node 1 gone; node 3 late; median 1.00 s, slowest 1.00 s an answer"
    assert slow([node(0, None, "absent"), node(1, None, "absent")]).headline == "Node 0, node 1"


def test_what_did_it_cost() -> None:
    run = view(bytes_up=1_000_000, bytes_down=1_000_000, reference_bytes=50_000_000,
               dense_up=8_000_000, dense_down=8_000_000, seconds=90.0)  # fmt: skip
    assert cost(run).headline == "2 MB"
    assert cost(run).detail == (
        "up 1 MB, down 1 MB; 25x less than the whole model; codecs save 8x; 1 min 30 s"
    )
    assert cost(view()).tone == "idle"


def test_the_phase_is_a_sentence() -> None:
    waiting = view(phase={"name": "fit", "round": 3, "have": 3, "need": 5})
    assert phase_sentence(waiting) == "round 3: fit, 3 of 5 answers"
    assert phase_sentence(view(phase={})) == "starting"
