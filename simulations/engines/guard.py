"""Ends what a simulation on Flower started, however its initiator ends: a module to run with the folder HOME.

Flower's processes run in sessions of their own and do not end with the SuperLink: left alone, an interrupted
run trains on unseen. The guard holds the reading end of a pipe. When the other end closes - at the run's end,
on Ctrl-C, or because the initiator was killed - it kills every process that carries the run's ``FLWR_HOME``
and removes that folder. Nothing is lost by that: the run folder is whole at any moment.
"""

from __future__ import annotations

import os
import shutil
import sys
import time

import psutil

__all__ = ["kill_all", "main"]


def kill_all(variable: str, value: str) -> None:
    """Kill every process whose environment sets ``variable`` to ``value``, until there is none."""
    while victims := [process for process in psutil.process_iter() if _carries(process, variable, value)]:
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(victims, timeout=1.0)
        time.sleep(0.05)


def _carries(process: psutil.Process, variable: str, value: str) -> bool:
    try:
        return process.pid != os.getpid() and bool(process.environ().get(variable) == value)
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def main(home: str) -> None:
    """Wait until standard input closes, then clean up."""
    sys.stdin.buffer.read()
    kill_all("FLWR_HOME", home)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
