"""Runs the cells of an experiment, each in a process of its own, several side by side.

A cell that fails says why, and the others go on. Ctrl-C stops every cell where it is whole; a kill leaves no
process behind. Either way the next start goes on from the cells' last rounds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from fedllm.errors import FedllmError
from fedllm.runs.lock import holder
from fedllm.runs.reader import Run
from fedllm.wording import human_seconds, number
from simulations.experiments.cells import CellRun
from simulations.running import Host

__all__ = ["run_all"]

_GRACE = 15.0
"""Seconds that a cell has to stop in when it is asked to."""


@dataclass
class _Running:
    cell: CellRun
    process: BaseProcess
    answer: Connection
    since: float


def run_all(runs: Sequence[CellRun], jobs: int, threads: int, note: Callable[[str], None]) -> dict[str, str]:
    """Run what is left of an experiment.

    Args:
        runs: in order.
        jobs: processes side by side.
        threads: torch threads of each, on which the last bits of a run depend.
        note: told of every cell that ends.

    Returns:
        Why cells failed, by label.

    Raises:
        KeyboardInterrupt: somebody pressed Ctrl-C; every cell has stopped.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["simulations.experiments.preloaded"])
    waiting, failed = list(runs), dict[str, str]()
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(server, waiting.pop(0), threads))
            ended = wait([one.process.sentinel for one in running])
            for one in [one for one in running if one.process.sentinel in ended]:
                running.remove(one)
                reason = _reason(one)
                if reason is not None:
                    failed[one.cell.label] = reason
                done = f"[{len(runs) - len(waiting) - len(running)}/{len(runs)}]"
                note(f"{done} {one.cell.label}: {_told(one, reason)}")
    finally:
        _stop(running)
    return failed


def _start(server: Any, cell: CellRun, threads: int) -> _Running:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = server.Process(target=_run, args=(cell, threads, theirs), name=cell.label)
    process.start()
    theirs.close()
    return _Running(cell, process, ours, time.monotonic())


def _run(cell: CellRun, threads: int, answer: Connection) -> None:
    """Run one cell in this process, and answer with what went wrong, or nothing."""
    from simulations import running

    # A terminal sends Ctrl-C to every process; who started this one decides and asks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _end_with_starter(answer)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            _wait_for_the_last(cell)
            cell.folder.parent.mkdir(parents=True, exist_ok=True)
            running.run(cell.config, cell.folder, Host(threads=threads), None)
            answer.send("")
        except FedllmError as error:
            answer.send(str(error))
        except Exception as error:
            answer.send(f"{type(error).__name__}: {error}")
            raise


def _end_with_starter(answer: Connection) -> None:
    """End this process when nobody is left to read its answer; its parent, the fork server, outlives it."""

    def watch() -> None:
        unread = select.poll()
        unread.register(answer.fileno(), 0)  # errors are told without being asked for: no reader is one
        unread.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait_for_the_last(cell: CellRun) -> None:
    """Let a process end whose parent was killed a moment ago."""
    deadline = time.monotonic() + 2 * _GRACE
    while holder(cell.folder) is not None and time.monotonic() < deadline:
        time.sleep(0.2)


def _reason(one: _Running) -> str | None:
    """Say why a process that has ended did not finish its cell; None where it did."""
    one.process.join()
    try:
        told = one.answer.recv()
    except EOFError:
        told = f"its process ended with status {one.process.exitcode}"
        if one.process.exitcode == -signal.SIGKILL:
            told += " (killed, most likely for want of memory: give fewer --jobs)"
        return told
    finally:
        one.answer.close()
    status = one.cell.status
    return told or (None if status == "finished" else f"the run is {status}")


def _told(one: _Running, reason: str | None) -> str:
    took = human_seconds(time.monotonic() - one.since)
    if reason is not None:
        return f"failed after {took}: {reason}"
    run = Run(one.cell.folder)
    metric = run.config.metric
    return f"{metric} {number(run.summary['metrics'].get(metric))} in {took}"


def _stop(running: Sequence[_Running]) -> None:
    """Ask all to stop where they are whole, and wait; who does not is killed, which loses a round at most."""
    for one in running:
        one.process.terminate()
    deadline = time.monotonic() + _GRACE
    for one in running:
        one.process.join(max(0.0, deadline - time.monotonic()))
        if one.process.is_alive():
            one.process.kill()
            one.process.join()
        one.answer.close()
