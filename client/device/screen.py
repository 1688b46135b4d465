"""What a device shows of its work: read from what Flower's processes and its own app print.

Flower starts a process for every message, which can tell the device's user something in one way only: it
prints a line, and the device reads what its processes print.
"""

from __future__ import annotations

import errno
import os
import re
import time
from dataclasses import dataclass, field

__all__ = ["NOT_ACTIVATED", "Progress", "say"]

NOT_ACTIVATED = 2004
"""Flower's code for a node that may not connect: unknown, or not yet known to have left."""

_DONE = re.compile(
    r"Sent successfully|Ignoring (reply )?message|Failed to (send|receive) message|Failed to create task"
)
"""How Flower says that nothing is left to do for a message."""

_MARK = "fedllm says: "
_NO_ROOM = "the disk is full: free space, or choose another folder with --state"
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def say(sentence: str) -> None:
    """Have the device's screen show a sentence; called in a process that Flower started."""
    print(_MARK + " ".join(sentence.split()), flush=True)


@dataclass
class Progress:
    """What the processes' own messages tell.

    Attributes:
        doing: in a few words.
        round: that is worked on, as the server calls it.
        answers: sent so far.
        busy: whether a message is being answered.
        worked: when it last was, by :func:`time.monotonic`.
        connected: whether the server lets this node in.
        refused: whether it just did not.
        attempts: to reach the server, that failed one after another.
        trouble: what kept this device out of its last exchange with a run; empty where nothing did.
        news: sentences to report, oldest first.
    """

    doing: str = "connecting"
    round: str = ""
    answers: int = 0
    busy: bool = False
    worked: float = 0.0
    connected: bool = False
    refused: bool = False
    attempts: int = 0
    trouble: str = ""
    news: list[str] = field(default_factory=list)
    _said: str = ""

    def read(self, line: str) -> None:
        """Take in a line that a process has printed."""
        if line.startswith(_MARK):
            self._tell(line.removeprefix(_MARK).rstrip())
        elif any(words in line for words in _FULL):
            self.note_full(True)
        elif found := re.search(r"ROUND (\S+)\]", line):
            self.round = found[1]
        elif "SuperNode ID:" in line:
            self.doing, self.connected, self.refused, self.attempts = "waiting for work", True, False, 0
        elif f"[code: {NOT_ACTIVATED}]" in line:
            self.refused = True
        elif "Connection attempt failed" in line:
            self.attempts += 1
        elif "Connection successful" in line:
            self.attempts = 0
        elif "Receiving:" in line:
            self.busy, self.worked, self.attempts, self._said = True, time.monotonic(), 0, ""
            introduces = self.round == "describe"
            self.doing = "introducing itself to a run" if introduces else f"working on round {self.round}"
        elif _DONE.search(line):
            self.answers += "Sent successfully" in line
            self.doing, self.busy, self.trouble = "waiting for work", False, self._said
            self.worked = time.monotonic()

    def disconnect(self) -> None:
        """Note that the process that talks to the server has ended."""
        self.doing, self.busy, self.connected, self.attempts = "connecting", False, False, 0

    def note_full(self, full: bool) -> None:
        """Note whether there is room on the device's disk."""
        if full:
            self._tell(_NO_ROOM)
        elif self.trouble == _NO_ROOM:
            self._said = self.trouble = ""

    def _tell(self, sentence: str) -> None:
        if sentence not in (self.trouble, self._said):
            self.news.append(sentence)
        self._said = self.trouble = sentence
