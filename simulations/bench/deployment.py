"""``fedllm bench deployment``: what a deployed round costs beyond the clients' computing, beside a stock app.

One SuperLink and two devices on this host, TLS and node authentication on. Three apps run one after another
on them: one that does nothing, stock FedAvg of MiniLM adapters, and ours. Rounds of the three have the same
training, 2 steps of 8 x 64 tokens.
"""

from __future__ import annotations

import json
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.device.bundle import Bundle
from client.device.participation import Device
from client.device.supervisor import join
from fedllm.config import RunConfig
from fedllm.errors import RunFailed
from fedllm.runs.reader import Run
from server.federation.control import Control
from server.federation.link import open_link
from server.federation.provision import provision
from server.federation.submit import bundle_of, follow, submit
from strategies.registry import resolve_run

__all__ = ["run"]

NODES = 2
STEPS = 2
APPS = ("client.app:app", *(f"simulations.bench.deployed.{name}_client:app" for name in ("idle", "stock")))


def run(*, rounds: int = 20) -> dict[str, Any]:
    """Measure the three apps.

    Args:
        rounds: of each app; the first, in which models are loaded, is left out of the medians.

    Returns:
        Per app the median of round seconds, of the longest client's computing, and of their difference; the
        ratio of our difference to the stock app's, and our seconds above the app that does nothing.
    """
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as name, _federation(Path(name)) as control:
        folder = Path(name)
        found = {
            "idle": _median(_run_app(control, folder, "idle", rounds)),
            "stock": _median(_run_app(control, folder, "stock", rounds)),
            "fedllm": _median(_run_ours(control, folder, rounds)),
        }
    overhead = {app: result["overhead_s"] for app, result in found.items()}
    return {
        **found,
        "rounds": rounds,
        "overhead_ratio_to_stock": overhead["fedllm"] / overhead["stock"],
        "seconds_above_idle": overhead["fedllm"] - overhead["idle"],
    }


@contextmanager
def _federation(folder: Path) -> Iterator[Control]:
    """Serve a federation on a free port, with two devices in threads that supervise real processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    bundles = [Bundle.read(path) for path in provision(folder, "localhost", NODES, port=port)]
    stop = threading.Event()
    with open_link(folder) as link:
        devices = [
            threading.Thread(
                target=join,
                args=(Device(bundle, folder / f"state-{bundle.node}", threads=1, apps=APPS),),
                kwargs={"report": lambda said: None, "stop": stop},
            )
            for bundle in bundles
        ]
        for device in devices:
            device.start()
        try:
            yield link.control
        finally:
            stop.set()
            for device in devices:
                device.join()


def _run_app(control: Control, folder: Path, app: str, rounds: int) -> list[dict[str, float]]:
    out = folder / f"{app}.json"
    config: dict[str, str | int] = {"clients": NODES, "rounds": rounds, "local-steps": STEPS, "out": str(out)}
    package = "simulations.bench.deployed"
    bundle = bundle_of(f"{package}.{app}_server:app", f"{package}.{app}_client:app", config)
    number = control.start(bundle, config)
    while (state := control.run(number)).status != "finished":
        time.sleep(1.0)
    if state.outcome != "completed":
        raise RunFailed(f"the {app} app ended as {state.outcome}: {state.details}")
    measured: list[dict[str, float]] = json.loads(out.read_text(encoding="utf-8"))
    return measured


def _run_ours(control: Control, folder: Path, rounds: int) -> list[dict[str, float]]:
    submitted = submit(folder, control, _configuration(rounds))
    follow(control, submitted)
    stored = Run(submitted.folder)
    longest = {
        record.round: max(node.compute_seconds for node in stored.nodes(round=record.round))
        for record in stored.rounds()
        if record.round > 0
    }
    return [
        {"seconds": record.seconds, "compute": longest[record.round]}
        for record in stored.rounds()
        if record.round > 0
    ]


def _configuration(rounds: int) -> RunConfig:
    return resolve_run(
        {
            "name": "ours",
            "clients": NODES,
            "rounds": rounds,
            "method": "lora",
            "data": {"name": "bbcnews", "max_length": 64},
            "tuning": {"rank": 8, "alpha": 16.0, "targets": ["query", "value"]},
            "training": {"local_steps": STEPS, "batch_size": 8},
            "evaluation": {"every": 0},
        }
    )


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    settled = rounds[1:] if len(rounds) > 1 else rounds
    return {
        "round_s": statistics.median(item["seconds"] for item in settled),
        "compute_s": statistics.median(item["compute"] for item in settled),
        "overhead_s": statistics.median(item["seconds"] - item["compute"] for item in settled),
    }
