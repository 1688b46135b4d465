"""What an operator does by commands and through the dashboard, on a real SuperLink with real devices."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.device.bundle import Bundle
from fedllm.host.processes import Child, open_log
from server.federation.link import connect
from server.federation.provision import provision
from tests.deployment.unlucky import start_device
from tests.processes import free_port, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FEDLLM = [sys.executable, "-c", "from fedllm.cli import main; main()"]
OWN_TEXTS = 60


@dataclass(frozen=True)
class Operated:
    """A served federation of two devices, the first with texts of its own, and a login to its dashboard."""

    folder: Path
    server: Child
    terminal: Path
    password: str
    web: httpx.Client

    def run(self, name: str) -> dict[str, Any]:
        """What the dashboard says of a run."""
        view: dict[str, Any] = self.web.get(f"/api/runs/{name}").json()
        return view


@pytest.fixture(scope="module")
def operated(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], tiny_texts: Path
) -> Iterator[Operated]:
    root = tmp_path_factory.mktemp("o")
    folder, port = root / "federation", free_port()
    bundles = [Bundle.read(path) for path in provision(folder, "localhost", 2, port=free_port())]
    own = root / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows[:OWN_TEXTS]))
    terminal = root / "terminal.log"
    command = [*FEDLLM, "server", str(folder), "--dashboard-port", str(port)]
    children = [server := Child(command, {}, open_log(terminal))]
    try:
        until(lambda: terminal.exists() and "password" in terminal.read_text())
        (password,) = re.findall(r"with the password (\S+)", terminal.read_text())
        web = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=240.0)
        until(lambda: answers(web))
        until(lambda: "serving localhost" in terminal.read_text())
        for bundle, data in zip(bundles, (own, None), strict=True):
            state = root / f"state-{bundle.node}"
            children.append(
                start_device(bundle, state, open_log(root / f"device-{bundle.node}.log"), data=data)
            )
        web.post("/login", data={"user": "operator", "password": password})
        web.headers["X-CSRF-Token"] = web.get("/api/session").json()["csrf"]
        yield Operated(folder, server, terminal, password, web)
    finally:
        for child in reversed(children):
            child.stop(grace=15.0)


def answers(web: httpx.Client) -> bool:
    try:
        return web.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def fedllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FEDLLM, *arguments], capture_output=True, text=True, timeout=600, check=False)


def settings(encoder: Path, texts: Path, rounds: int) -> dict[str, Any]:
    return {
        "model.name": str(encoder), "data.path": str(texts), "data.max_length": 16, "clients": 2,
        "rounds": rounds, "training.local_steps": 1, "tuning.targets": ["query", "value"], "tuning.rank": 2,
    }  # fmt: skip


def test_the_first_password_is_on_the_terminal_and_nowhere_else(operated: Operated) -> None:
    assert operated.web.get("/api/session").json()["role"] == "operator"
    kept = [path for path in operated.folder.rglob("*") if path.is_file()]
    assert operated.folder / "dashboard.log" in kept
    assert not [path for path in kept if operated.password.encode() in path.read_bytes()]


def test_nodes_are_online_once_they_have_joined(operated: Operated) -> None:
    def states() -> list[str]:
        return [row["status"] for row in operated.web.get("/api/nodes").json()]

    until(lambda: states() == ["online", "online"])


def test_a_run_started_on_the_dashboard_shows_its_logs_and_its_traffic(
    operated: Operated, tiny_encoder: Path, tiny_texts: Path
) -> None:
    body = {"name": "first", "preset": "quickstart", "settings": settings(tiny_encoder, tiny_texts, 2)}
    started = operated.web.post("/api/runs", json=body)
    assert started.status_code == 202, started.text
    assert operated.run("first")["state"] in ("starting", "running")
    until(lambda: operated.run("first")["state"] not in ("starting", "running"))
    assert operated.run("first")["state"] == "finished"
    logs = operated.web.get("/api/runs/first/logs").json()
    told = {node: "".join(row["lines"] for row in logs if row["node"] == node) for node in (0, 1)}
    assert all(f": node {node} of localhost" in lines for node, lines in told.items())
    # One event says how it ended, and what the SuperLink counted is there although nobody followed the run.
    events = [row["kind"] for row in operated.web.get("/api/runs/first/events").json()]
    assert events.count("finished") == 1
    counted = operated.web.get("/api/runs/first/files/summary.json").json()["bytes"]
    assert 0 < counted["up"] < counted["wire_up"]
    assert 0 < counted["down"] < counted["wire_down"]
    said = operated.web.get("/api/runs/first/output").text
    assert "conducts the run first" in said
    assert said.count("ServerApp finished running") == 1


def test_a_device_trains_on_its_own_texts(operated: Operated) -> None:
    own, shared = operated.web.get("/api/runs/first/nodes").json()
    assert own["examples"] == OWN_TEXTS
    assert shared["examples"] > OWN_TEXTS


def test_a_run_is_detached_from_stopped_and_resumed_by_commands(
    operated: Operated, tiny_encoder: Path, tiny_texts: Path
) -> None:
    given = {
        **settings(tiny_encoder, tiny_texts, 500),
        "tuning.targets": '["query", "value"]',
        "name": "long",
    }
    overrides = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    federation = ("--server", str(operated.folder))
    submitted = fedllm("run", "quickstart", *overrides, *federation, "--detach")
    assert (submitted.returncode, "long" in submitted.stderr) == (0, True), submitted.stderr
    again = fedllm("run", "quickstart", *overrides, *federation, "--detach")
    assert (again.returncode, "choose another name" in again.stderr) == (2, True), again.stderr
    until(lambda: operated.run("long").get("round", 0) >= 1)
    assert fedllm("run", *federation, "--stop", "long").returncode == 0
    stopped = operated.run("long")
    assert stopped["state"] == "stopped"
    refused = fedllm("resume", str(operated.folder / "runs" / "long"))
    assert (refused.returncode, "fedllm run --resume long" in refused.stderr) == (2, True)
    assert fedllm("run", *federation, "--resume", "long", "--detach").returncode == 0
    until(lambda: operated.run("long")["round"] > stopped["round"])
    assert fedllm("run", *federation, "--stop", "long").returncode == 0


def test_ctrl_c_ends_all_of_it(operated: Operated) -> None:
    os.kill(operated.server.pid, signal.SIGINT)
    until(lambda: operated.server.poll() is not None)
    assert operated.server.poll() == 0
    assert not answers(operated.web)
    with connect(operated.folder) as control:
        assert not control.ready()
    assert operated.terminal.read_text().rstrip().endswith("stopped")
