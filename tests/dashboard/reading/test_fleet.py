"""Three thousand nodes: no page fails, and each is sent no more rows than it shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from fedllm.runs.writer import RunStore
from tests.dashboard.browser import Served, log_in, serve
from tests.dashboard.crowd import make

pytestmark = pytest.mark.slow
expect.set_options(timeout=240_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root: Path = tmp_path_factory.mktemp("fleet") / "runs"
    make(root / "fleet", rounds=4, nodes=3000, seed=0, status="running")
    with RunStore.open(root / "fleet") as store, serve(root) as found:
        store.phase("fit", round=5, have=17, need=3000)
        yield found


def test_no_page_fails(served: Served, browser: Browser) -> None:
    page = log_in(browser, served)
    for path in ("/", "/runs/fleet", "/nodes?run_name=fleet", "/start?clone=fleet", "/access"):
        answer = page.goto(path)
        assert answer is not None
        assert answer.status == 200, path
        expect(page.get_by_role("heading").first).to_be_visible()


def test_the_last_node_is_found_by_turning_the_table_round(served: Served, browser: Browser) -> None:
    page = log_in(browser, served)
    page.goto("/runs/fleet")
    header = page.get_by_role("columnheader", name="Node", exact=True)
    rows = page.locator("tbody tr")
    expect(rows.first.locator("td").first).to_have_text("0")
    for first in ("0", "2999"):
        header.get_by_role("button").click()
        expect(rows.first.locator("td").first).to_have_text(first)
    expect(rows).to_have_count(50)
