"""``fedllm server DIR``: a SuperLink that is kept alive, with what belongs beside it, until Ctrl-C."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock

from fedllm.errors import ConfigError, RunFailed
from fedllm.host.processes import Kept, interruptible
from server.federation.control import Control
from server.federation.link import READY_SECONDS, Link, enrol, open_link
from server.federation.provision import read
from server.federation.watch import Runs

__all__ = ["await_link", "is_served", "serve"]

WATCH_SECONDS = 2.0


def serve(
    folder: Path,
    *,
    bind: str = "0.0.0.0",
    insecure: bool = False,
    beside: Sequence[Kept] = (),
    go_on: bool = False,
    report: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C. A SuperLink that dies comes back; keys added or revoked take effect as they change.

    Args:
        folder: made by ``provision``.
        bind: address to listen on.
        insecure: see :func:`open_link`.
        beside: further processes, such as the dashboard, that are kept alive and end with the server.
        go_on: resume the runs that were running when the server, or its SuperLink, went down.
        report: receives a sentence when something changes.
    """
    with _sole_server(folder):
        _serve(folder, bind, insecure, beside, go_on, report)


def _serve(
    folder: Path,
    bind: str,
    insecure: bool,
    beside: Sequence[Kept],
    go_on: bool,
    report: Callable[[str], None],
) -> None:
    if insecure:
        report("INSECURE: no encryption, no authentication; whoever reaches this port can join and read")
    with interruptible() as stop:
        try:
            delay = 1.0
            runs = Runs(folder, report)
            while not stop.is_set():
                began = time.monotonic()
                left = runs.left()
                with open_link(folder, bind=bind, insecure=insecure) as link:
                    federation = read(folder)
                    report(
                        f"serving {federation.host}:{federation.port} for {len(federation.nodes)} nodes; "
                        f"log: {folder / 'superlink' / 'superlink.log'}"
                    )
                    runs.take_up(left, link.control, go_on=go_on)
                    _watch(link, folder, insecure, beside, runs, stop, report)
                if not stop.is_set():
                    # A SuperLink that keeps dying at once is given more and more time.
                    delay = 1.0 if time.monotonic() - began > 60 else min(2 * delay, 60.0)
                    report(f"the SuperLink ended unexpectedly; starting it again in {delay:.0f} s")
                    stop.wait(delay)
        finally:
            for companion in beside:
                companion.stop()
    report("stopped")


@contextlib.contextmanager
def _sole_server(folder: Path) -> Iterator[None]:
    """Hold the lock by which others know that the folder is being served, even between two SuperLinks."""
    read(folder)
    (folder / "superlink").mkdir(exist_ok=True, mode=0o700)
    try:
        held = _serving(folder).acquire(timeout=1.0)  # whoever asks holds it for an instant
    except filelock.Timeout as error:
        raise ConfigError(f"another fedllm server serves {folder}; stop it first") from error
    with held:
        yield


def _serving(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / "superlink" / "serving")


def is_served(folder: Path) -> bool:
    """Whether ``fedllm server`` keeps a SuperLink of this folder alive, though it may just be starting."""
    if not (folder / "superlink").is_dir():
        return False
    lock = _serving(folder)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def await_link(folder: Path, control: Control) -> None:
    """Wait until the SuperLink of a folder that is being served answers: it may just be started anew.

    Raises:
        RunFailed: nobody serves the folder, or the SuperLink does not answer within a minute.
    """
    deadline = time.monotonic() + READY_SECONDS
    while not control.ready():
        if not is_served(folder):
            raise RunFailed(
                f"nobody serves {folder} on this host ({control.trouble}); start it: fedllm server {folder}"
            )
        if time.monotonic() > deadline:
            raise RunFailed(
                f"the SuperLink does not answer on {control.address}: {control.trouble or 'silence'}; "
                f"see {folder / 'superlink' / 'superlink.log'}"
            )
        time.sleep(0.2)


def _watch(
    link: Link,
    folder: Path,
    insecure: bool,
    beside: Sequence[Kept],
    runs: Runs,
    stop: threading.Event,
    report: Callable[[str], None],
) -> None:
    def serves() -> bool:
        return link.child.poll() is None

    seen = read(folder)
    while serves():
        for companion in beside:
            if ended := companion.tend():
                report(ended)
        runs.look(serves)
        if stop.wait(WATCH_SECONDS):
            return
        current = read(folder)
        if current != seen and not insecure:
            for change in enrol(current, link.control):
                report(change)
            seen = current
