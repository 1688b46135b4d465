"""Who else takes part with a device's bundle, and checks made in the background while it goes on trying."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from client.device.bundle import Bundle
    from client.device.checks import Finding

__all__ = ["COUNTED_SECONDS", "Background", "Presence", "sole_user"]

COUNTED_SECONDS = 120.0
"""Longest that a server counts a node whose connection broke as there: twice what Flower allows."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 15.0, 600.0
"""Between two looks at what keeps a device from its server."""

_MARK = "connected"


@contextlib.contextmanager
def sole_user(bundle: Bundle, state: Path) -> Iterator[None]:
    """Hold a bundle and a state folder for one client.

    Raises:
        ConfigError: another client on this machine uses one of them, or the key cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            key = stack.enter_context(bundle.key.open("rb"))
        except OSError as error:
            raise ConfigError(
                f"{bundle.key} cannot be read: {error.strerror}; give it to the user who starts this"
            ) from error
        if not _locked(key.fileno()):
            raise ConfigError(
                f"another client on this machine takes part with {bundle.folder}; stop it, or make a bundle "
                "for this one, on the server: fedllm provision DIR --add-node"
            )
        try:
            stack.enter_context(filelock.FileLock(state / "lock", timeout=0))
        except filelock.Timeout as error:
            raise ConfigError(
                f"another client uses {state}; stop it, or give this one its own --state"
            ) from error
        yield


def _locked(key: int) -> bool:
    """Lock a bundle by its key, since it may lie where nothing can be written; false where another has it."""
    try:
        fcntl.flock(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network's file system that locks nothing read-only: the server still lets in only one
        return True
    return True


class Presence:
    """Remembers, over restarts, when this device was last connected.

    A server that counts a node as connected refuses it. Where this device was connected a moment ago that is
    its own last connection, which runs out; otherwise it is somebody else's.

    Args:
        state: the device's folder.
    """

    def __init__(self, state: Path) -> None:
        self._mark = state / _MARK
        self._noted = -COUNTED_SECONDS

    def note(self) -> None:
        """Note that the device is connected; writes every few seconds at most."""
        now = time.monotonic()
        if now - self._noted > COUNTED_SECONDS / 12:
            self._noted = now
            with contextlib.suppress(OSError):  # a full disk is said elsewhere
                self._mark.touch(mode=0o600)
                os.utime(self._mark)

    def recent(self) -> bool:
        """Whether a server may still count this device's own last connection."""
        try:
            # Without a clock of its own a device may have gone back in time since.
            return time.time() - self._mark.stat().st_mtime < COUNTED_SECONDS
        except OSError:
            return False


class Background:
    """Makes checks in a thread of its own, as often as that is asked for, but ever less often.

    Args:
        look: makes the checks; takes up to half a minute where nothing answers.
    """

    def __init__(self, look: Callable[[], list[Finding]]) -> None:
        self._look, self._pause = look, FIRST_PAUSE_SECONDS
        self._thread: threading.Thread | None = None
        self._due = 0.0
        self._found: list[Finding] | None = None

    def begin(self) -> None:
        """Look, unless a look is under way or was taken a moment ago."""
        if self._thread is None and time.monotonic() >= self._due:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def found(self) -> list[Finding] | None:
        """Return what the last look found, once; None where there is nothing new."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        self._due = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return self._found

    def reset(self) -> None:
        """Look at once when it is asked for the next time."""
        self._due, self._pause = 0.0, FIRST_PAUSE_SECONDS

    def _run(self) -> None:
        self._found = None
        self._found = self._look()
