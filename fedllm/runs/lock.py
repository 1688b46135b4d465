"""One writer per run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from fedllm.errors import StoreError

__all__ = ["FILE", "RunLock", "holder"]

FILE = "lock"


class RunLock:
    """Held until :meth:`release` or the end of the process, however it ends.

    Raises:
        StoreError: another process runs this folder; names its pid.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _acquire(self._descriptor, fcntl.LOCK_EX, patience=0.5):
                pid = os.pread(self._descriptor, 32, 0).decode().strip() or "unknown"
                raise StoreError(f"{folder} is being run by process {pid}: wait for it or stop it first")
        except BaseException:
            os.close(self._descriptor)
            raise
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        # A forked worker that outlives a killed run must not keep the run locked.
        os.register_at_fork(after_in_child=self._forget)

    def release(self) -> None:
        """Let others run the folder."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._forget()

    def _forget(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _acquire(descriptor: int, kind: int, patience: float) -> bool:
    # Whoever merely asks holds a shared lock for an instant, hence the patience.
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)


def holder(folder: Path) -> int | None:
    """Return the pid of the process that runs a folder, or None."""
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot read {folder / FILE}: {error.strerror}") from error
    try:
        if _acquire(descriptor, fcntl.LOCK_SH, patience=0.0):
            return None
        return int(os.pread(descriptor, 32, 0).decode().strip() or -1)
    finally:
        os.close(descriptor)
