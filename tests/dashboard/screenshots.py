"""The pictures in docs/images: python -m tests.dashboard.screenshots."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

from fedllm.runs.writer import RunStore
from tests.dashboard.browser import Served, chromium, log_in, serve
from tests.dashboard.crowd import fill, make

IMAGES = Path(__file__).parents[2] / "docs" / "images"
LIVE = "fedkd-live"
SHOTS = {
    "run": (f"/runs/{LIVE}", {"viewport": {"width": 1280, "height": 1000}}),
    "runs-dark": ("/", {"viewport": {"width": 1280, "height": 760}, "color_scheme": "dark"}),
    "phone": (f"/runs/{LIVE}", {"viewport": {"width": 390, "height": 844}}),
}


def _shoot(browser: Browser, served: Served, name: str) -> None:
    path, options = SHOTS[name]
    page = log_in(browser, served, **options)
    page.goto(path)
    page.locator("td").first.wait_for()
    page.wait_for_timeout(3000)
    file = IMAGES / f"dashboard-{name}.png"
    page.screenshot(path=file)
    # Flat colours: a palette loses nothing that can be seen, and two thirds of the bytes.
    Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)
    page.context.close()


def main() -> None:
    """Make up runs, one of them under way, and take the pictures."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        fill(root, runs=12, rounds=30, nodes=20)
        make(root / LIVE, 24, 8, seed=2, status="running")
        with RunStore.open(root / LIVE) as store, serve(root) as served, chromium() as browser:
            store.phase("fit", round=25, have=5, need=8, rounds=44, closes_at=time.time() + 580)
            for name in SHOTS:
                _shoot(browser, served, name)


if __name__ == "__main__":
    main()
