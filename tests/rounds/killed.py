"""Processes that conduct a run and kill themselves, all made of one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import torch
from flwr.app import Message

from fedllm.config import RunConfig
from tests.rounds.federation import run

LAST = 9
"""Reply at which a process dies that was to die by the clock, and has not."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def conducted(config: RunConfig, folder: Path, when: str = "never:0") -> int | None:
    """Conduct a run, or go on with it, in a process of its own; return its exit code.

    Args:
        config: the run.
        folder: its folder.
        when: it dies: ``reply:N`` (after the N-th reply was sent, before anything is made of it) or
            ``time:S`` (S seconds after the first reply, wherever the process then is, but at the ninth reply
            at the latest: no machine is so fast that a run is over before); without it the run goes to its
            end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fedllm.models.tuning.adapters"])
    process = context.Process(target=_conduct, args=(config.to_json(), folder, when))
    process.start()
    process.join()
    return process.exitcode


def _conduct(config: str, folder: Path, when: str) -> None:
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
        if replies == (int(number) if kind == "reply" else LAST if kind == "time" else -1):
            die()
        return message

    run(RunConfig.from_json(config), folder, fault)
