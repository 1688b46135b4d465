"""A federation's server: the SuperLink with TLS and node authentication, the provisioned nodes registered.

``serve`` is what ``fedllm server DIR`` does; ``open_link`` is its with-statement form. State lies in
``DIR/superlink`` (database, log, Flower's home), results in ``DIR/runs``.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fedllm.errors import ConfigError, RunFailed
from fedllm.processes import Child, interruptible, open_log
from server.control import Control, read_public_key
from server.provision import Federation, read

__all__ = ["Link", "connect", "enrol", "open_link", "serve"]

READY_SECONDS = 60.0
WATCH_SECONDS = 2.0


class Link(NamedTuple):
    """A running SuperLink: its process, and a connection to its Control API."""

    child: Child
    control: Control


def connect(folder: Path, *, insecure: bool = False) -> Control:
    """Connect to the SuperLink that serves this folder on this host."""
    federation = read(folder)
    return Control(f"127.0.0.1:{federation.port}", None if insecure else folder / "ca.pem")


@contextlib.contextmanager
def open_link(folder: Path, *, bind: str = "0.0.0.0", insecure: bool = False) -> Iterator[Link]:
    """Start a SuperLink, wait until it answers, register the nodes; stop all of it on the way out.

    Args:
        folder: made by ``provision``.
        bind: address to listen on.
        insecure: no TLS and no node authentication: anybody on the network may join and read.

    Raises:
        ConfigError: the port is taken.
        RunFailed: the SuperLink ended or did not answer within a minute.
    """
    federation = read(folder)
    _require_free(bind, federation.port)
    child = _start(federation, bind, insecure)
    try:
        with connect(folder, insecure=insecure) as control:
            _await_ready(child, control, folder)
            if not insecure:
                enrol(federation, control)
            yield Link(child, control)
    finally:
        child.stop()


def serve(
    folder: Path,
    *,
    bind: str = "0.0.0.0",
    insecure: bool = False,
    beside: Sequence[Callable[[], Child]] = (),
    report: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C. A SuperLink that dies comes back; keys added or revoked take effect as they change.

    Args:
        folder: made by ``provision``.
        bind: address to listen on.
        insecure: see :func:`open_link`.
        beside: starts further processes, such as the dashboard, that end with the server.
        report: receives a sentence when something changes.
    """
    if insecure:
        report("INSECURE: no encryption, no authentication; whoever reaches this port can join and read")
    companions = []
    with interruptible() as stop:
        try:
            companions = [start() for start in beside]
            delay = 1.0
            while not stop.is_set():
                began = time.monotonic()
                with open_link(folder, bind=bind, insecure=insecure) as link:
                    federation = read(folder)
                    report(
                        f"serving {federation.host}:{federation.port} for {len(federation.nodes)} nodes; "
                        f"log: {folder / 'superlink' / 'superlink.log'}"
                    )
                    _watch(link, folder, insecure, stop, report)
                if not stop.is_set():
                    # A SuperLink that keeps dying at once is given more and more time.
                    delay = 1.0 if time.monotonic() - began > 60 else min(2 * delay, 60.0)
                    report(f"the SuperLink ended unexpectedly; starting it again in {delay:.0f} s")
                    stop.wait(delay)
        finally:
            for companion in companions:
                companion.stop()
    report("stopped")


def enrol(federation: Federation, control: Control) -> list[str]:
    """Make the SuperLink's list of nodes equal to the folder's; returns what changed."""
    wanted = {read_public_key(path): f"node-{number}" for number, path in federation.nodes.items()}
    known = {node.public_key: node for node in control.nodes()}
    changes = []
    for key in known.keys() - wanted.keys():
        control.unregister(known[key].id)
        changes.append(f"{known[key].name or known[key].id} may no longer join")
    for key in sorted(wanted.keys() - known.keys(), key=wanted.__getitem__):
        control.register(key, wanted[key])
        changes.append(f"{wanted[key]} may join")
    return changes


def _watch(
    link: Link, folder: Path, insecure: bool, stop: threading.Event, report: Callable[[str], None]
) -> None:
    seen = read(folder)
    while link.child.poll() is None and not stop.wait(WATCH_SECONDS):
        current = read(folder)
        if current != seen and not insecure:
            for change in enrol(current, link.control):
                report(change)
            seen = current


def _start(federation: Federation, bind: str, insecure: bool) -> Child:
    folder = federation.folder.resolve()
    state = folder / "superlink"
    state.mkdir(exist_ok=True, mode=0o700)
    security = (
        ["--insecure"]
        if insecure
        else [
            *("--ssl-ca-certfile", str(folder / "ca.pem")),
            *("--ssl-certfile", str(folder / "server.pem")),
            *("--ssl-keyfile", str(folder / "server-key.pem")),
            "--enable-supernode-auth",
        ]
    )
    command = [
        *(sys.executable, "-m", "server.superlink"),
        *security,
        *("--host", bind, "--port", str(federation.port)),
        *("--database", str(state / "state.db")),
        "--disable-runtime-dependency-installation",
    ]
    environment = {
        "FLWR_HOME": str(state),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "FEDLLM_RUNS": str(folder / "runs"),
    }
    return Child(command, environment, open_log(state / "superlink.log"))


def _require_free(bind: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {bind} port {port}: {error.strerror}; is another server running?"
            ) from error


def _await_ready(child: Child, control: Control, folder: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not control.ready():
        if child.poll() is not None or time.monotonic() > deadline:
            raise RunFailed(f"the SuperLink did not start; see {folder / 'superlink' / 'superlink.log'}")
        time.sleep(0.1)
