"""Keeping a device's processes alive: restart with backoff, and an eye on what they hold in memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil

from fedllm.processes import Child

__all__ = ["Kept", "resident_bytes"]

LONGEST_DELAY = 300.0
STEADY_SECONDS = 60.0


class Kept:
    """A process that is started again whenever it ends, each time later, up to five minutes.

    Args:
        name: for what is reported.
        start: starts it.
        first_delay: seconds before the first restart; a process that held a minute starts from here again.
    """

    def __init__(self, name: str, start: Callable[[], Child], *, first_delay: float = 1.0) -> None:
        self.name = name
        self.restarts = 0
        self._start = start
        self._first_delay = first_delay
        self._delay = first_delay
        self._child: Child | None = None
        self._began = 0.0
        self._due = 0.0

    @property
    def pid(self) -> int | None:
        """Process id, or None while it is down."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def tend(self) -> str | None:
        """Start it if it is due. Returns a sentence when it has ended since the last call."""
        now = time.monotonic()
        if self._child is None:
            if now >= self._due:
                self._child, self._began = self._start(), now
            return None
        status = self._child.poll()
        if status is None:
            return None
        self._child.stop()
        self._child = None
        self.restarts += 1
        if now - self._began > STEADY_SECONDS:
            self._delay = self._first_delay
        self._due = now + self._delay
        sentence = f"the {self.name} ended with status {status}; starting it again in {self._delay:.0f} s"
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        return sentence

    def stop(self) -> None:
        """End it; the next :meth:`tend` starts it anew."""
        if self._child is not None:
            self._child.stop()
        self._child = None
        self._due = 0.0


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children, in bytes; 0 once it is gone."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += int(process.memory_info().rss)
    return total
