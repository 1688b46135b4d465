"""The engine ``flower``: the project's apps on Flower's Simulation Runtime, that is, on Ray.

Flower 1.42 runs a simulation as a deployment does: ``flwr run`` submits a bundle to a SuperLink, here one
started with ``--simulation``, which runs the ServerApp, Ray and its actors in a process of their own. All of
it lives in a temporary ``FLWR_HOME`` and on a free local port, so that runs beside each other never meet. The
bundle names the apps but holds no code: every process imports the installed packages that the caller runs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import tomli_w

from fedllm.config import RunConfig
from fedllm.errors import RunFailed
from fedllm.extras import require

__all__ = ["App", "run_app", "simulate"]

_STARTUP_S = 60.0
_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    "FLWR_TELEMETRY_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class App:
    """The two halves of a Flower app, each as ``module:attribute`` of an installed module."""

    server: str
    client: str


FEDLLM = App(server="server.app:app", client="client.app:app")


def simulate(config: RunConfig, folder: Path, workers: int, threads: int = 1) -> None:
    """Run a configuration with one virtual node per client; the ServerApp writes its results to ``folder``.

    Args:
        config: the resolved configuration.
        folder: the run folder, to be made or continued. What all processes said ends up in its
            ``flower.log``; until then, and where the run failed, in a file beside the folder.
        workers: Ray actors that answer for the clients.
        threads: cores, thus torch threads, of each actor.

    Raises:
        RunFailed: with the app's own reason.
        ConfigError: Ray is not installed.
    """
    require("ray", "--engine flower")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.flower.log")
    run_config = {"fedllm": config.to_json(), "run-dir": str(folder.resolve())}
    run_app(FEDLLM, run_config, config.clients, log, workers=workers, cores=threads)
    log.replace(folder / "flower.log")


def run_app(
    app: App, run_config: Mapping[str, Any], nodes: int, log: Path, *, workers: int, cores: int = 1
) -> None:
    """Run a Flower app with ``nodes`` virtual nodes to its end.

    Args:
        app: where the app's two halves are.
        run_config: what the apps find in ``context.run_config``; flat, of str, int, float and bool.
        nodes: virtual SuperNodes; each has its number in ``node_config["partition-id"]``.
        log: file that collects what all processes say; overwritten.
        workers: Ray actors.
        cores: cores, thus torch threads, of each actor.

    Raises:
        RunFailed: with the app's own reason, or with what kept Flower from starting.
    """
    resources = f"client-resources-num-cpus={cores} init-args-num-cpus={workers * cores}"
    with log.open("wb") as output, _home() as home:
        port = _free_port()
        _write_home(home, port, app, run_config)
        environment = _environment(home)
        submit = ["flwr", "run", str(home / "app"), "simulation", "--stream"]
        submit += ["--run-config", str(home / "run.toml")]
        submit += ["--federation-config", f"num-supernodes={nodes} {resources}"]
        with _superlink(port, environment, output):
            subprocess.run(
                submit, env=environment, stdout=output, stderr=output, start_new_session=True, check=False
            )
            _require_success(environment, log)


@contextmanager
def _home() -> Iterator[Path]:
    """Make a folder for ``FLWR_HOME``; processes that still use it afterwards are killed by the guard."""
    home = tempfile.mkdtemp(prefix="fedllm-flower-")
    command = [sys.executable, "-m", "simulations.engines.guard", home]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        assert guard.stdin is not None
        with guard.stdin:
            yield Path(home)


def _write_home(root: Path, port: int, app: App, run_config: Mapping[str, Any]) -> None:
    """Lay out ``FLWR_HOME``: the SuperLink's address, a bundle that only names the apps, the run's values."""
    flower = {
        "publisher": "fedllm",
        "components": {"serverapp": app.server, "clientapp": app.client},
        "config": dict(run_config),
    }
    project = {"name": "fedllm", "version": version("fedllm"), "description": "-", "license": "Apache-2.0"}
    superlink = {"address": f"127.0.0.1:{port}", "insecure": True}
    documents: dict[str, Mapping[str, Any]] = {
        "config.toml": {"superlink": {"default": "simulation", "simulation": superlink}},
        "app/pyproject.toml": {"project": project, "tool": {"flwr": {"app": flower}}},
        "run.toml": run_config,
    }
    (root / "app").mkdir()
    for name, document in documents.items():
        (root / name).write_text(tomli_w.dumps(document), encoding="utf-8")


def _environment(home: Path) -> dict[str, str]:
    """Flower's processes find each other's commands on PATH: put this interpreter's first."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **_ENVIRONMENT, "FLWR_HOME": str(home), "PATH": path}


@contextmanager
def _superlink(port: int, environment: dict[str, str], output: IO[bytes]) -> Iterator[None]:
    command = ["flower-superlink", "--simulation", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        _await_health(process, port)
        yield
    finally:
        # It holds its state in memory only: nothing is lost, and a polite stop would wait for open streams.
        process.kill()
        process.wait()


def _await_health(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _STARTUP_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunFailed(f"Flower's SuperLink stopped at once with exit code {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1.0).close()
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.05)
        else:
            return
    raise RunFailed(f"Flower's SuperLink did not answer within {_STARTUP_S:.0f} s")


def _require_success(environment: dict[str, str], log: Path) -> None:
    """Ask the SuperLink how its one run ended."""
    listing = subprocess.run(
        ["flwr", "ls", "simulation", "--format", "json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        check=False,
    )
    try:
        run = json.loads(listing.stdout)["runs"][0]
    except (json.JSONDecodeError, LookupError):
        raise RunFailed(f"Flower did not take the run; see {log}") from None
    if run["status"] != "finished:completed":
        reason = str(run["status-details"]).removeprefix("Simulation failed with exception: ")
        raise RunFailed(f"{reason} (Flower says {run['status']}; see {log})")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
