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
from fedllm.processes import Child, Kept, interruptible, open_log
from server.app import FEDERATION
from server.control import Control, read_public_key
from server.provision import Federation, read

__all__ = ["Link", "connect", "enrol", "open_link", "require_free", "serve"]

READY_SECONDS = 60.0
WATCH_SECONDS = 2.0


class Link(NamedTuple):
    """A running SuperLink: its process, and a connection to its Control API."""

    child: Child
    control: Control


def connect(folder: Path) -> Control:
    """Connect to the SuperLink that serves this folder on this host, by TLS unless it was started without."""
    federation = read(folder)
    insecure = _insecure_mark(folder).exists()
    return Control(f"127.0.0.1:{federation.port}", None if insecure else folder / "ca.pem")


def _insecure_mark(folder: Path) -> Path:
    return folder / "superlink" / "insecure"


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
    require_free(bind, federation.port, "is another server running?")
    child = _start(federation, bind, insecure)
    try:
        with connect(folder) as control:
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
    beside: Sequence[Kept] = (),
    report: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C. A SuperLink that dies comes back; keys added or revoked take effect as they change.

    Args:
        folder: made by ``provision``.
        bind: address to listen on.
        insecure: see :func:`open_link`.
        beside: further processes, such as the dashboard, that are kept alive and end with the server.
        report: receives a sentence when something changes.
    """
    if insecure:
        report("INSECURE: no encryption, no authentication; whoever reaches this port can join and read")
    with interruptible() as stop:
        try:
            delay = 1.0
            while not stop.is_set():
                began = time.monotonic()
                with open_link(folder, bind=bind, insecure=insecure) as link:
                    federation = read(folder)
                    report(
                        f"serving {federation.host}:{federation.port} for {len(federation.nodes)} nodes; "
                        f"log: {folder / 'superlink' / 'superlink.log'}"
                    )
                    _watch(link, folder, insecure, beside, stop, report)
                if not stop.is_set():
                    # A SuperLink that keeps dying at once is given more and more time.
                    delay = 1.0 if time.monotonic() - began > 60 else min(2 * delay, 60.0)
                    report(f"the SuperLink ended unexpectedly; starting it again in {delay:.0f} s")
                    stop.wait(delay)
        finally:
            for companion in beside:
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
    link: Link,
    folder: Path,
    insecure: bool,
    beside: Sequence[Kept],
    stop: threading.Event,
    report: Callable[[str], None],
) -> None:
    seen = read(folder)
    while link.child.poll() is None:
        for companion in beside:
            if ended := companion.tend():
                report(ended)
        if stop.wait(WATCH_SECONDS):
            return
        current = read(folder)
        if current != seen and not insecure:
            for change in enrol(current, link.control):
                report(change)
            seen = current


def _start(federation: Federation, bind: str, insecure: bool) -> Child:
    folder = federation.folder.resolve()
    state = folder / "superlink"
    state.mkdir(exist_ok=True, mode=0o700)
    _insecure_mark(folder).unlink(missing_ok=True)
    if insecure:
        _insecure_mark(folder).touch()
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
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        FEDERATION: str(folder),
    }
    return Child(command, environment, open_log(state / "superlink.log"))


def require_free(host: str, port: int, advice: str) -> None:
    """Check that a TCP port can be listened on; raises ``ConfigError`` with the advice where it is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; {advice}") from error


def _await_ready(child: Child, control: Control, folder: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not control.ready():
        if child.poll() is not None or time.monotonic() > deadline:
            raise RunFailed(f"the SuperLink did not start; see {folder / 'superlink' / 'superlink.log'}")
        time.sleep(0.1)
