"""What a ServerApp does besides when a SuperLink runs it: keep a log, and ask what the SuperLink knows."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import httpx

from fedllm.errors import FedllmError, RunFailed
from fedllm.host.processes import open_log
from server.federation.link import authenticates, connect, enrolled
from server.federation.provision import authority, read, signer
from server.federation.submit import log_of, numbers
from server.rounds.conduct import Transport

__all__ = ["keep_log", "traffic", "transport"]

logger = logging.getLogger(__name__)


def keep_log(federation: Path, run: str) -> None:
    """Write what Flower, fedllm and Python log in this process to a bounded file as well."""
    for handler in open_log(log_of(federation, run)).handlers:
        logging.getLogger().addHandler(handler)
    for package in ("fedllm", "strategies", "server"):
        logging.getLogger(package).setLevel(logging.INFO)
    logger.info("process %d conducts the run %s", os.getpid(), run)


def transport(federation: Path, run: str, bound: Callable[[int], None]) -> Transport:
    """Return what a run may ask of the SuperLink that serves a federation, and tell it.

    Args:
        federation: its folder.
        run: the run's name.
        bound: lets replies have so many bytes.
    """

    def proven() -> dict[int, int]:
        try:
            with connect(federation) as control:
                return enrolled(read(federation), control)
        except httpx.HTTPError as error:
            raise RunFailed(f"the SuperLink does not say whose key each node has ({error})") from error

    keyed = authenticates(federation)
    return Transport(
        traffic=lambda: traffic(federation, run),
        proven=proven if keyed else None,
        bound=bound,
        signer=signer(federation),
        authority=authority(federation) if keyed else None,
    )


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
