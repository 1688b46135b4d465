"""Real SuperLinks and SuperNodes for the tests of this folder."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.checks import Bundle
from fedllm.processes import Child, open_log
from server.control import Control, Run
from server.provision import provision
from server.submit import bundle_of

IDLE = "simulations.bench.deployed.idle"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition; fail the test where it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {seconds} s")
        time.sleep(0.1)


def supernode(bundle: Bundle, folder: Path, *, insecure: bool = False) -> Child:
    """Start a bare SuperNode, without a worker beside it."""
    command = [sys.executable, "-m", "client.supernode", "--superlink", bundle.server]
    keys = ["--root-certificates", str(bundle.authority), "--auth-supernode-private-key", str(bundle.key)]
    command += ["--insecure"] if insecure else keys
    command += ["--node-config", f"partition-id={bundle.node}", "--port", str(free_port())]
    environment = {
        "FLWR_HOME": str(folder / f"home-{bundle.node}"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }
    return Child(command, environment, open_log(folder / f"node-{bundle.node}.log"))


@contextlib.contextmanager
def supernodes(bundles: list[Bundle], folder: Path) -> Iterator[list[Child]]:
    children = [supernode(bundle, folder) for bundle in bundles]
    try:
        yield children
    finally:
        for child in children:
            child.stop()


def idle_run(control: Control, nodes: int, rounds: int = 1) -> Run:
    """Run the do-nothing app to its end."""
    config = {"rounds": rounds, "clients": nodes, "out": ""}
    number = control.start(bundle_of(f"{IDLE}_server:app", f"{IDLE}_client:app", config), config)
    until(lambda: control.run(number).status == "finished", 120.0)
    return control.run(number)


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[int], tuple[Path, list[Bundle]]]:
    """Provision a federation on a free port of this machine."""

    def make(nodes: int) -> tuple[Path, list[Bundle]]:
        folder = tmp_path / "federation"
        return folder, [Bundle.read(path) for path in provision(folder, "localhost", nodes, port=free_port())]

    return make
