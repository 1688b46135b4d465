"""Other processes under test: their ports, whether they live, and waiting for what they do."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator

import psutil

__all__ = ["alive", "free_port", "orphans_unburied", "until"]

_FIRST, _LAST = 20_000, 32_000
_CANDIDATES = itertools.count(101 * os.getpid())


def free_port() -> int:
    """Find a TCP port on which nobody listens, never the same twice.

    It lies below those that a system gives to outgoing connections: one of them could be taken by any client
    on this machine before the server that it is meant for has started.
    """
    for candidate in _CANDIDATES:
        port = _FIRST + candidate % (_LAST - _FIRST)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")


def until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """Wait for a condition; fail the test where a busy machine would have had time for it several times."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {seconds} s")
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def orphans_unburied() -> Iterator[None]:
    """Adopt orphaned processes and let those that ended stay, as the first process of a container may."""
    be_subreaper = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl
    before = {child.pid for child in psutil.Process().children()}
    assert ctypes.CDLL(None).prctl(be_subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(be_subreaper, 0, 0, 0, 0)
        for child in psutil.Process().children():
            if child.pid not in before and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, 0)
