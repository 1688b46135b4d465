"""A federation's server: the SuperLink with TLS and node authentication, the provisioned nodes registered.

State lies in ``DIR/superlink`` (database, log, Flower's home), results in ``DIR/runs``. What keeps a
SuperLink alive is :mod:`server.federation.serving`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from fedllm.errors import ConfigError, FedllmError, RunFailed
from fedllm.host.processes import Child, open_log
from fedllm.runs.durable import replace_file
from server.federation import FEDERATION
from server.federation.control import Control, read_public_key
from server.federation.provision import Federation, address_of, certify, read
from server.federation.submit import SUPERLINK
from server.federation.tokens import BOUND, TOKEN, make
from server.federation.uploads import LIMITS

__all__ = [
    "Link",
    "authenticates",
    "connect",
    "enrol",
    "enrolled",
    "here",
    "open_link",
    "reached",
    "require_free",
]

READY_SECONDS = 60.0


class Link(NamedTuple):
    """A running SuperLink: its process, and a connection to its Control API."""

    child: Child
    control: Control


def connect(folder: Path) -> Control:
    """Connect to the SuperLink that serves this folder on this host, by TLS unless it was started without."""
    federation = read(folder)
    authority = folder / "ca.pem" if authenticates(folder) else None
    state = folder / "superlink"
    try:
        bind = (state / BOUND).read_text()
    except FileNotFoundError:
        bind = "0.0.0.0"
    return Control(address_of(here(bind), federation.port), authority, state / TOKEN)


@contextlib.contextmanager
def reached(folder: Path) -> Iterator[Control]:
    """Talk to the SuperLink that serves this folder on this host.

    Raises:
        FedllmError: it does not answer, or no longer.
    """
    with connect(folder) as control:
        try:
            yield control
        except httpx.TransportError as error:
            raise FedllmError(
                f"the server of {folder} does not answer on {control.address} ({error}); start it with: "
                f"fedllm server {folder}"
            ) from error


def here(bind: str) -> str:
    """Return the address under which this host itself finds what listens on ``bind``.

    >>> here("0.0.0.0"), here("::"), here("192.0.2.7")
    ('127.0.0.1', '::1', '192.0.2.7')
    """
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)


def authenticates(folder: Path) -> bool:
    """Whether the SuperLink that serves this folder asks nodes for their keys."""
    return not _insecure_mark(folder).exists()


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
    if not insecure:
        certify(folder, here(bind))
    child = _start(federation, bind, insecure)
    try:
        with connect(folder) as control:
            _await_ready(child, control, folder)
            if not insecure:
                enrol(federation, control)
            yield Link(child, control)
    finally:
        child.stop()


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


def enrolled(federation: Federation, control: Control) -> dict[int, int]:
    """Return the number that each node's key was made for, by the id that Flower gave the key."""
    number_of = {read_public_key(path): number for number, path in federation.nodes.items()}
    return {node.id: number_of[node.public_key] for node in control.nodes() if node.public_key in number_of}


def _start(federation: Federation, bind: str, insecure: bool) -> Child:
    folder = federation.folder.resolve()
    state = folder / "superlink"
    state.mkdir(exist_ok=True, mode=0o700)
    make(state)
    shutil.rmtree(state / LIMITS, ignore_errors=True)
    replace_file(state / BOUND, bind)
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
        *(sys.executable, "-m", SUPERLINK),
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
        # What runs here finds the SuperLink on this host, whatever proxy leads elsewhere.
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1", "::1", here(bind)))),
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
        log = f"see {folder / 'superlink' / 'superlink.log'}"
        if (status := child.poll()) is not None:
            raise RunFailed(f"the SuperLink ended with status {status} as it started; {log}")
        if time.monotonic() > deadline:
            raise RunFailed(
                f"the SuperLink does not answer on {control.address}: {control.trouble or 'silence'}; {log}"
            )
        time.sleep(0.1)
