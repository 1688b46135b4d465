"""A hundred runs of two hundred rounds with fifty nodes, and nobody waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from server.dashboard.reading.runs import RunIndex
from tests.dashboard.browser import Served, log_in, serve
from tests.dashboard.crowd import copies

pytestmark = pytest.mark.slow
_LOOKS = 20
_PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
"""Milliseconds; undefined until it is noted, a moment after."""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("crowd") / "runs"
    copies(root, runs=100, rounds=200, nodes=50)
    return root


@pytest.fixture(scope="module")
def served(crowd: Path) -> Iterator[Served]:
    with serve(crowd) as found:
        yield found


def test_every_page_is_painted_within_a_second(served: Served, browser: Browser) -> None:
    page = log_in(browser, served)
    painted: dict[str, float] = {}
    for path in ("/", "/runs/run-000", "/nodes"):
        # The best of many: what is promised is for an idle machine, and other programs share this one.
        for _ in range(_LOOKS):
            page.goto(path)
            page.locator("td").first.wait_for()
            painted[path] = page.wait_for_function(_PAINTED).json_value()
            if painted[path] <= 1000:
                break
    assert {path: ms for path, ms in painted.items() if ms > 1000} == {}


def test_looking_again_costs_next_to_nothing(crowd: Path) -> None:
    index = RunIndex(crowd)
    assert len(index.overviews()) == 100
    taken = []
    for _ in range(_LOOKS):
        started = time.perf_counter()
        index.overviews()
        taken.append(time.perf_counter() - started)
        if taken[-1] < 0.1:
            break
    assert min(taken) < 0.1
