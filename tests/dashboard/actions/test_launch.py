"""Runs that the dashboard starts, rolls back and clones are real ones, and come out the same."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedllm.runs.reader import Run
from server.dashboard.actions.operations import Operations
from tests.dashboard.client import TestClient
from tests.processes import alive, free_port, until

pytestmark = pytest.mark.slow


def _await_end(client: TestClient, name: str, patience: float = 240.0) -> dict[str, Any]:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        view: dict[str, Any] = client.get(f"/api/runs/{name}").json()
        if view["state"] in ("finished", "failed"):
            return view
        time.sleep(0.3)
    raise AssertionError(client.get(f"/api/runs/{name}/output").text)


def test_start_roll_back_clone(
    ops: Operations, operator: TestClient, tiny_texts: Path, tiny_encoder: Path
) -> None:
    settings = {
        "model.name": str(tiny_encoder), "data.path": str(tiny_texts), "clients": 3, "rounds": 3,
        "training.local_steps": 1, "tuning.targets": ["query", "value"],
    }  # fmt: skip
    body = {"name": "first", "preset": "quickstart", "settings": settings}
    assert operator.post("/api/runs", json=body).status_code == 202
    assert operator.post("/api/runs", json=body).status_code == 409
    assert _await_end(operator, "first")["round"] == 3
    assert operator.get("/api/runs/first/files/adapter.zip").status_code == 200
    sha = Run(ops.root / "first").rounds()[-1].state_sha256
    _await_exit(ops, "first")

    assert operator.post("/api/runs/first/continue", json={"round": 2}).status_code == 202
    _await_exit(ops, "first")
    assert _await_end(operator, "first")["round"] == 3
    assert Run(ops.root / "first").rounds()[-1].state_sha256 == sha

    asked = operator.post("/api/runs/first/clone", json={"name": "second", "settings": {"rounds": 1}})
    assert asked.status_code == 202
    assert _await_end(operator, "second")["rounds"] == 1
    assert operator.get("/api/runs/second/config").json()["clients"] == 3
    _await_exit(ops, "second")
    done = [(line["action"], line["run"]) for line in reversed(operator.get("/api/audit").json())]
    assert done == [("login", ""), ("start", "first"), ("go on", "first"), ("clone", "second")]


def _await_exit(ops: Operations, name: str) -> None:
    until(lambda: not ops.launcher.busy(name))


def test_what_cannot_start_says_why(operator: TestClient) -> None:
    body = {"name": "x", "preset": "quickstart", "settings": {"training.local_stps": 4}}
    answer = operator.post("/api/runs", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"] == "unknown key training.local_stps; did you mean local_steps?"
    assert operator.post("/api/runs", json={"name": "x", "preset": "../etc/passwd"}).status_code == 404


def test_a_dashboard_beside_a_command_ends_with_it_however_it_ends(tmp_path: Path) -> None:
    """As under ``fedllm simulate --dashboard``: nobody would find it again."""
    child = f"[{sys.executable!r}, '-m', 'server.dashboard', {str(tmp_path)!r}, '--port', '{free_port()}']"
    code = f"import subprocess; child = subprocess.Popen({child}); print(child.pid, flush=True); child.wait()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        dashboard = psutil.Process(int(parent.stdout.readline()))
        until(dashboard.net_connections)
        parent.kill()
    until(lambda: not alive(dashboard))
