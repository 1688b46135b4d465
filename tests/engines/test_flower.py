"""The launcher of Flower's Simulation Runtime, with an app that only echoes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedllm.errors import RunFailed
from simulations.engines.flower import App, run_app
from simulations.engines.guard import kill_all
from tests.processes import until

ECHO = App("tests.engines.echo_server:app", "tests.engines.echo_client:app")
NODES = 5
AWKWARD = '{"text": "it\'s a \\"quoted\\" = value",\n "n": [1, 2]}'


def run_config(folder: Path, order: str) -> dict[str, str | int]:
    return {"folder": str(folder), "order": order, "nodes": NODES}


@pytest.mark.slow
def test_every_node_answers_once_and_the_configuration_arrives_unchanged(tmp_path: Path) -> None:
    run_app(ECHO, run_config(tmp_path, AWKWARD), NODES, tmp_path / "flower.log", workers=2)
    result = json.loads((tmp_path / "said.json").read_text())
    assert result["order"] == AWKWARD
    assert sorted(said["partition"] for said in result["said"]) == list(range(NODES))
    assert len({said["process"] for said in result["said"]}) <= 2


@pytest.mark.slow
def test_the_reason_of_a_failed_app_reaches_the_caller(tmp_path: Path) -> None:
    log = tmp_path / "flower.log"
    with pytest.raises(RunFailed, match="told to fail, with 'quotes'"):
        run_app(ECHO, run_config(tmp_path, "fail"), NODES, log, workers=1)
    assert "ValueError: told to fail" in log.read_text()


@pytest.mark.slow
def test_an_app_that_does_not_exist_is_a_failed_run(tmp_path: Path) -> None:
    app = App("tests.engines.nowhere:app", ECHO.client)
    with pytest.raises(RunFailed, match=r"flower\.log"):
        run_app(app, run_config(tmp_path, "-"), NODES, tmp_path / "flower.log", workers=1)
    assert "tests.engines.nowhere" in (tmp_path / "flower.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_caller(tmp_path: Path, ending: signal.Signals) -> None:
    script = (
        "import signal, sys; from pathlib import Path; from tests.engines.test_flower import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs\n"
        "folder = Path(sys.argv[1])\n"
        "run_app(ECHO, run_config(folder, 'hang'), NODES, folder / 'flower.log', workers=1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stderr=subprocess.DEVNULL) as caller:
        try:
            until((tmp_path / "started").exists)
            homes = set(homes_of(caller.pid))
            assert len(homes) == 1
        except BaseException:
            caller.kill()  # or it would be waited for, for ever
            raise
        caller.send_signal(ending)
    until(lambda: not any(carries(process, *homes) for process in psutil.process_iter()))
    until(lambda: not any(Path(home).exists() for home in homes))


def test_the_guard_kills_by_the_run_and_nothing_else() -> None:
    sleepers = [
        psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"FLWR_HOME": home})
        for home in ("/run/one", "/run/other")
    ]
    try:
        kill_all("FLWR_HOME", "/run/one")
        assert [sleeper.is_running() for sleeper in sleepers] == [False, True]
    finally:
        for sleeper in sleepers:
            sleeper.communicate()


def carries(process: psutil.Process, home: str) -> bool:
    try:
        return process.environ().get("FLWR_HOME") == home
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def homes_of(pid: int) -> Iterator[str]:
    """Yield ``FLWR_HOME`` of Flower's processes below another; those that end meanwhile have none."""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if process.name().startswith(("flower-", "flwr-")):
                yield process.environ()["FLWR_HOME"]
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
