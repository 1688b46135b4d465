"""The browser of the dashboard's tests: found wherever it is, or installed.

python -m tests.dashboard.chromium prints its path; make test calls it, so a fresh machine needs nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["VARIABLE", "NoBrowser", "find", "require"]

VARIABLE = "FEDLLM_BROWSER"
"""Environment variable that names the browser's program; nothing else is looked at then."""

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
)
"""What the programs are called on the search path."""

PLACES = (
    "/usr/bin/chromium",
    "/usr/lib/chromium/chromium",
    "/opt/google/chrome/chrome",
    "/opt/microsoft/msedge/msedge",
    "/snap/bin/chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)
"""Where they lie when the search path does not name them."""

INSTALLING = 600
"""Seconds that one way of installing a browser may take."""

PLAYWRIGHT = (
    "from playwright.sync_api import sync_playwright\n"
    "with sync_playwright() as p: print(p.chromium.executable_path)"
)
"""Asked in a process of its own: playwright may be at work in this one."""


class NoBrowser(Exception):
    """No browser was found and none could be installed; says what to do."""


def find() -> Path | None:
    """Return the first Chrome, Chromium or Edge that starts.

    Raises:
        NoBrowser: the environment variable names something that does not start.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not _starts(Path(named)):
            raise NoBrowser(f"{VARIABLE}={named} does not start: name Chrome, Chromium or Edge, or unset it")
        return Path(named)
    return next(filter(_starts, _candidates()), None)


def require() -> Path:
    """Return a browser that starts; installs one where none is.

    Raises:
        NoBrowser: there is none and none could be installed.
    """
    found = find()
    for command in () if found else _installers():
        print("no browser for the dashboard's tests:", *command, file=sys.stderr, flush=True)
        # A registry that cannot be reached may neither answer nor refuse, and nobody is there to be asked.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, stdout=sys.stderr, timeout=INSTALLING
            )
        found = find()
        if found is not None:
            break
    if found is None:
        raise NoBrowser(
            "the dashboard's tests need Chrome, Chromium or Edge, and none could be installed: "
            f"install one with the system's packages, or set {VARIABLE} to its program"
        )
    return found


def _candidates() -> Iterator[Path]:
    yield from (Path(path) for name in NAMES if (path := shutil.which(name)))
    yield from map(Path, PLACES)
    asked = subprocess.run([sys.executable, "-c", PLAYWRIGHT], capture_output=True, text=True, check=False)
    yield from (Path(line) for line in asked.stdout.splitlines())


def _starts(program: Path) -> bool:
    """Whether a program runs: a package may be a stub, a download may lack its libraries."""
    if not program.is_file():
        return False
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=240).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _installers() -> Iterator[list[str]]:
    """Yield commands that may install one: the system's packages where that is allowed, then playwright's."""
    playwright = [sys.executable, "-m", "playwright", "install"]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        apt = "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium"
        yield ["sh", "-c", f"apt-get update -qq && {apt}"]
        yield [*playwright, "--with-deps", "chromium"]
    else:
        yield [*playwright, "chromium"]


def main() -> None:
    """Print the path of a browser, or one sentence that says what to do."""
    try:
        print(require())
    except NoBrowser as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
