"""What a device's own log says since its last answer, short enough to travel with the next one.

Nothing of that was read from the device's texts: lines that may hold some begin with another word, and of an
exception its kind alone is told.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

__all__ = ["LONGEST", "log_of", "news"]

LONGEST = 1900
"""Characters of a report; a reply takes 2,000."""
FURTHEST = 64_000
"""Bytes of the log that are looked back."""

_WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
_OURS = re.compile(_WHEN + r"(device: (?!data: )|worker: )")
"""Of this project's own lines those about texts stay: they quote what is wrong with them."""
_OTHERS = re.compile(
    _WHEN + r"\W*(?:\[\d+m)?(?:WARN(?:ING)?|ERROR)\b|" + _WHEN + r"(?:\w+\.)*\w*(?:Error|Exception|Warning)\b"
)
"""Flower's warnings and errors, and the kinds of exceptions."""


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
    told = "\n".join(filter(None, map(_told_of, lines)))[-LONGEST:]
    if told:
        # Where the disk is full the lines are told again: better than an answer that is not sent for that.
        with contextlib.suppress(OSError):
            mark.write_text(f"{log.stat().st_ino} {whole}")
    return told


def _told_of(line: str) -> str:
    """Return what of a line may travel; empty where nothing may."""
    if _OURS.match(line):
        return line
    found = _OTHERS.match(line)
    if found is None:
        return ""
    # An exception's own words may quote a text; Flower's are about the network.
    return found[0] if found[0].endswith(("Error", "Exception", "Warning")) else line


def _told(mark: Path, log: Path, whole: int) -> int:
    """Up to which byte the log has been told; 0 where it is another file since."""
    with contextlib.suppress(OSError, ValueError):
        file, position = map(int, mark.read_text().split())
        if file == log.stat().st_ino and position <= whole:
            return position
    return 0
