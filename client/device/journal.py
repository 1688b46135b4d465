"""What a device's own log says since its last answer, short enough to travel with the next one."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

__all__ = ["LONGEST", "log_of", "news"]

LONGEST = 1900
"""Characters of a report; a reply takes 2,000."""
FURTHEST = 64_000
"""Bytes of the log that are looked back."""

_TELLING = re.compile(r"device: |worker: |warn|error|traceback|exception", re.IGNORECASE)


def log_of(state: Path) -> Path:
    """Where a device logs, given the folder of its durable state."""
    return state / "client.log"


def news(log: Path) -> str:
    """Return the last lines that tell of something - starts, ends, warnings, errors - since the last call.

    Lines that were not told by the last call because they were too many stay in the device's own log.
    """
    mark = log.with_name("log-told")
    try:
        with log.open("rb") as file:
            whole = file.seek(0, 2)
            start = max(_told(mark, log, whole), whole - FURTHEST)
            file.seek(start)
            lines = file.read(whole - start).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    told = "\n".join(line for line in lines if _TELLING.search(line))[-LONGEST:]
    if told:
        # Where the disk is full the lines are told again: better than an answer that is not sent for that.
        with contextlib.suppress(OSError):
            mark.write_text(f"{log.stat().st_ino} {whole}")
    return told


def _told(mark: Path, log: Path, whole: int) -> int:
    """Up to which byte the log has been told; 0 where it is another file since."""
    with contextlib.suppress(OSError, ValueError):
        file, position = map(int, mark.read_text().split())
        if file == log.stat().st_ino and position <= whole:
            return position
    return 0
