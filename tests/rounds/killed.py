"""A process that conducts a run and kills itself: ``python -m tests.rounds.killed CONFIG FOLDER [WHEN]``.

WHEN is ``reply:N`` (after the N-th reply was sent, before anything is made of it) or ``time:S`` (S seconds
after the first reply, wherever the process then is); without it the run goes to its end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import torch
from flwr.app import Message

from fedllm.config import RunConfig
from tests.rounds.federation import run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(config: str, folder: str, when: str = "never:0") -> None:
    torch.set_num_threads(1)
    kind, _, number = when.partition(":")
    replies = 0

    def fault(message: Message) -> Message:
        nonlocal replies
        if message.metadata.group_id == "describe":
            return message
        replies += 1
        if kind == "time" and replies == 1:
            threading.Timer(float(number), die).start()
        if kind == "reply" and replies == int(number):
            die()
        return message

    run(RunConfig.from_json(Path(config).read_text(encoding="utf-8")), Path(folder), fault)


if __name__ == "__main__":
    main(*sys.argv[1:])
