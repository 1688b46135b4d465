"""The runs of a federation while it is served: who died is noted, who went down with the server may go on.

A run's process writes how it ends. One that is interrupted or killed does not, and Flower notices after a
minute; here its lock tells within seconds. What called itself running when the server came up went down with
it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from fedllm.errors import FedllmError, StoreError
from fedllm.runs.amending import settle, unsettled
from fedllm.runs.lock import holder
from fedllm.runs.reader import find
from server.federation.control import Control
from server.federation.submit import ENDING_SECONDS, resume

__all__ = ["Runs"]


class Runs:
    """Looks after the runs in ``FEDERATION/runs``.

    Args:
        federation: the server's folder.
        report: receives a sentence for each run that was interrupted, or goes on.
    """

    def __init__(self, federation: Path, report: Callable[[str], None]) -> None:
        self._federation, self._report = federation, report
        self._live: set[Path] = set()

    def left(self) -> list[Path]:
        """Return the runs that call themselves running; asked before the SuperLink starts, none of them is.

        A process that the last SuperLink has left behind may hold one for some seconds more.
        """
        return [folder for folder in self._folders() if _is_held(folder) or _is_unsettled(folder)]

    def take_up(self, left: list[Path], control: Control, *, go_on: bool) -> None:
        """Note of runs that went down with the server that they were interrupted, or let them go on."""
        deadline = time.monotonic() + ENDING_SECONDS
        self._live.clear()  # whoever lived before the SuperLink went down is among those that are left
        for folder in left:
            while _is_held(folder) and time.monotonic() < deadline:
                time.sleep(0.1)
            if not _is_unsettled(folder):
                continue  # it has ended by itself
            reason = f"fedllm run --resume {folder.name} goes on with it"
            if go_on:
                try:
                    resume(self._federation, control, folder.name)
                    self._report(f"{folder.name} goes on: it was running when the server went down")
                    continue
                except (FedllmError, httpx.HTTPError) as error:
                    reason = f"it cannot go on: {error}"
            self._settle(folder, f"was interrupted when the server went down; {reason}")

    def look(self, serves: Callable[[], bool]) -> None:
        """Note of runs whose process has died since the last look that they were interrupted.

        Args:
            serves: whether the SuperLink is alive. Where it is not, they went down with it: see :meth:`left`.
        """
        held = {folder for folder in self._folders() if _is_held(folder)}
        if not serves():
            return
        for folder in sorted(self._live - held):
            reason = f"fedllm run --resume {folder.name} goes on with it"
            self._settle(folder, f"was interrupted: its process died; {reason}")
        self._live = held

    def _folders(self) -> list[Path]:
        with contextlib.suppress(StoreError):  # there is no such folder before the first run
            return find(self._federation / "runs")
        return []

    def _settle(self, folder: Path, sentence: str) -> None:
        try:
            if settle(folder):
                self._report(f"{folder.name} {sentence}")
        except StoreError as error:  # a full disk, say: the server goes on
            self._report(str(error))


def _is_held(folder: Path) -> bool:
    with contextlib.suppress(StoreError):
        return holder(folder) is not None
    return False


def _is_unsettled(folder: Path) -> bool:
    with contextlib.suppress(StoreError):  # what is no run, or damaged, is nothing to look after
        return unsettled(folder)
    return False
