"""The three answers, from numbers chosen by hand."""

from __future__ import annotations

from typing import Any

import pytest

from server.dashboard.shelf import Overview
from server.dashboard.totals import NodeTotal
from server.dashboard.verdict import cost, health, phase_sentence, slow


def view(**given: Any) -> Overview:
    base: dict[str, Any] = {
        "name": "a", "state": "running", "clients": 5, "round": 4, "rounds": 10, "changed_at": 1000.0,
        "series": [0.5, 0.6, 0.7, 0.8], "round_seconds": 2.0, "phase": {"name": "fit", "round": 5},
    }  # fmt: skip
    return Overview(**(base | given))


@pytest.mark.parametrize(
    ("given", "tone", "headline"),
    [
        ({}, "good", "Running well"),
        ({"state": "paused"}, "warn", "Paused"),
        ({"state": "failed", "reason": "quorum"}, "bad", "Failed"),
        ({"state": "interrupted"}, "bad", "Interrupted"),
        ({"changed_at": 939.0}, "bad", "No progress"),
        ({"changed_at": 939.0, "round_seconds": 20.0}, "good", "Running well"),
        ({"failures": 3, "rejected": 2}, "warn", "Losing answers"),
        ({"failures": 2, "rejected": 2}, "good", "Running well"),
        ({"series": [0.9, 0.79]}, "warn", "Accuracy is falling"),
        ({"series": [0.9, 0.81]}, "good", "Running well"),
    ],
)
def test_is_it_running_well(given: dict[str, Any], tone: str, headline: str) -> None:
    assert health(view(**given), now=1000.0)[:2] == (tone, headline)


def test_who_is_slow() -> None:
    def node(number: int, seconds: float | None) -> NodeTotal:
        return NodeTotal(node=number, compute_seconds=seconds, transfer_seconds=0.0)

    assert slow([node(0, 1.0), node(1, None)]).tone == "idle"
    assert slow([node(0, 1.0), node(1, 1.4), node(2, 1.0)]).headline == "Nobody"
    found = slow([node(0, 1.0), node(1, 1.6), node(2, 1.0), node(3, 5.0), node(4, 1.0)])
    assert (found.tone, found.headline) == ("warn", "Node 3, node 1")
    assert "median 1.00 s, slowest 5.00 s" in found.detail


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
