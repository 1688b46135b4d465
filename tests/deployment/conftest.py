"""Real SuperLinks and SuperNodes for the tests of this folder."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.device.bundle import Bundle
from fedllm.host.processes import Child, open_log
from server.federation.control import Control, Run
from server.federation.provision import provision
from server.federation.submit import bundle_of
from tests.processes import free_port, until

IDLE = "simulations.bench.deployed.idle"

LAST_WORDS = 2000
"""Characters."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show how the logs of a failed test's processes end: its folder may be gone before anybody looks."""
    report = yield
    folder: Any = item.funcargs.get("tmp_path")
    if report.failed and folder is not None:
        for log in sorted(folder.rglob("*.log")):
            words = log.read_text(encoding="utf-8", errors="replace")[-LAST_WORDS:]
            report.sections.append((f"end of {log.relative_to(folder)}", words))
    return report


def supernode(
    bundle: Bundle, folder: Path, *, insecure: bool = False, app: str = f"{IDLE}_client:app"
) -> Child:
    """Start a bare SuperNode, without a worker beside it, that runs one installed app."""
    command = [sys.executable, "-m", "client.device.supernode", "--superlink", bundle.server]
    keys = ["--root-certificates", str(bundle.authority), "--auth-supernode-private-key", str(bundle.key)]
    command += ["--insecure"] if insecure else keys
    command += ["--node-config", f"partition-id={bundle.node}", "--port", str(free_port())]
    command += ["--app", app]
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
    until(lambda: control.run(number).status == "finished")
    return control.run(number)


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[int], tuple[Path, list[Bundle]]]:
    """Provision a federation on a free port of this machine."""

    def make(nodes: int) -> tuple[Path, list[Bundle]]:
        folder = tmp_path / "federation"
        return folder, [Bundle.read(path) for path in provision(folder, "localhost", nodes, port=free_port())]

    return make
