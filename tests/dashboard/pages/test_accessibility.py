"""Every page passes axe-core's default rules (WCAG 2.1, levels A and AA): light, dark, and on a phone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from fedllm.runs.writer import RunStore
from tests.dashboard.browser import Served, log_in, serve
from tests.dashboard.crowd import fill, make

pytestmark = pytest.mark.slow

LIVE = "fedkd-live"
_STILL = """() => window.socket && window.socket.connected && document.getAnimations().every(
    moving => moving.playState !== "running" || moving.effect.getComputedTiming().iterations === Infinity
)"""
"""The page has its live connection, and nothing on it fades in any more."""
LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("dashboard") / "runs"
    fill(root, runs=12, rounds=12, nodes=8)
    make(root / LIVE, 12, 8, seed=2, status="running")
    with RunStore.open(root / LIVE) as store, serve(root) as found:
        store.phase("fit", round=13, have=5, need=8, rounds=32, closes_at=time.time() + 3600)
        yield found


def violations(page: Page) -> str:
    found = Axe().run(page)
    assert found.response["passes"]
    return str(found.generate_report()) if found.violations_count else ""


@pytest.mark.parametrize("look", LOOKS)
def test_no_page_breaks_a_rule(browser: Browser, served: Served, look: str) -> None:
    page = browser.new_context(base_url=served.url, **LOOKS[look]).new_page()  # type: ignore[arg-type]
    page.goto("/")
    page.get_by_role("button", name="Log in").wait_for()
    assert violations(page) == ""
    page = log_in(browser, served, **LOOKS[look])
    for path in ("/", f"/runs/{LIVE}", "/runs/fwdllm-001", "/nodes", "/access", "/start", "/runs/nothing"):
        page.goto(path)
        page.locator("h1").wait_for()
        page.wait_for_function(_STILL)
        assert violations(page) == "", path


def test_a_rule_that_is_broken_is_found(browser: Browser, served: Served) -> None:
    page = log_in(browser, served)
    page.evaluate("document.querySelector('h1').style.color = '#fefefe'")
    assert "color-contrast" in violations(page)
