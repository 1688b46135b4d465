"""What a ServerApp does besides when a SuperLink runs it: keep a log, and ask what the SuperLink counted."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import httpx

from fedllm.errors import FedllmError
from fedllm.processes import open_log
from server.link import connect
from server.submit import log_of, numbers

__all__ = ["keep_log", "traffic"]

logger = logging.getLogger(__name__)


def keep_log(federation: Path, run: str) -> None:
    """Write what Flower, fedllm and Python log in this process to a bounded file as well."""
    for handler in open_log(log_of(federation, run)).handlers:
        logging.getLogger().addHandler(handler)
    for package in ("fedllm", "strategies", "server"):
        logging.getLogger(package).setLevel(logging.INFO)
    logger.info("process %d conducts the run %s", os.getpid(), run)


def traffic(federation: Path, run: str) -> tuple[int | None, int | None]:
    """Return the bytes up and down that the SuperLink counted for a run, over all its sessions.

    Neither is known where the SuperLink cannot be asked, or has forgotten a session: its database was lost.
    """
    try:
        with connect(federation) as control:
            counted = [control.run(number) for number in numbers(federation)[run]]
    except (FedllmError, httpx.HTTPError, KeyError):
        return None, None
    return sum(one.bytes_up for one in counted), sum(one.bytes_down for one in counted)
