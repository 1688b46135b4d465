"""Runs whose server waits for nothing: what it would wait for has happened, or never will."""

from __future__ import annotations

import time

import pytest

from server.rounds import admission, engine
from server.rounds.exchange import conversation
from server.rounds.timing import buffered


class LeapingClock:
    """Stands in for ``time``: a pause moves it on by as much as the pause would have taken, at once.

    Attributes:
        paused: seconds of all pauses.
    """

    def __init__(self) -> None:
        self.paused = 0.0
        self.time = time.time

    def monotonic(self) -> float:
        return time.monotonic() + self.paused

    def sleep(self, seconds: float) -> None:
        self.paused += seconds


@pytest.fixture(autouse=True)
def leaping_clock(monkeypatch: pytest.MonkeyPatch) -> LeapingClock:
    """The server's clock. Clients answer while it looks for replies: nothing happens in a pause."""
    clock = LeapingClock()
    for module in (admission, buffered, conversation, engine):
        monkeypatch.setattr(module, "time", clock)
    return clock
