"""A dashboard as a process of its own, and a browser to look at it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

from server.dashboard.door.access import Accounts
from tests.dashboard.chromium import require
from tests.processes import free_port

__all__ = ["Served", "chromium", "log_in", "serve"]


@dataclass(frozen=True)
class Served:
    """Where a dashboard answers, and who may enter."""

    url: str
    root: Path
    operator: str
    viewer: str


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser without a window; ends with the block."""
    program = require()
    arguments = ["--no-sandbox", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Served]:
    """Serve a folder of runs on a free port; ends with the block."""
    accounts = Accounts(root / ".dashboard")
    operator, viewer = accounts.add_user("olive", "operator"), accounts.add_user("vera", "viewer")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "server.dashboard", str(root), "--port", str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _await(url, process)
        yield Served(url, root, operator, viewer)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=240)


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, "the dashboard ended at once"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError("the dashboard does not answer")


def log_in(browser: Browser, served: Served, name: str = "olive", **options: object) -> Page:
    """Open a page and log in through the form."""
    context = browser.new_context(base_url=served.url, **options)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(240_000)
    page.goto("/")
    page.get_by_label("User").fill(name)
    page.get_by_label("Password").fill(served.operator if name == "olive" else served.viewer)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="Runs").wait_for()
    return page
