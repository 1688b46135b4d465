"""A whole federation on this machine: a SuperLink, and devices in processes of their own, on a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from client.checks import Bundle
from fedllm.config import RunConfig
from fedllm.processes import Child, open_log
from fedllm.runs import Run as StoredRun
from server.link import Link, open_link
from server.provision import provision
from server.submit import Submitted, follow, submit
from tests.deployment.conftest import free_port, until

DEVICE = """
import sys
from pathlib import Path
from client import device
from client.checks import Bundle
bundle, state, answer = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
command = device._worker_command
device._worker_command = lambda *given: [*command(*given), "--answer", answer]
device.join(device.Device(Bundle.read(bundle), state, threads=1), report=print, status=print)
"""
HONEST = "client.worker:answer_bytes"


class Federation:
    """Devices by number, on one SuperLink."""

    def __init__(self, folder: Path, bundles: list[Bundle], link: Link) -> None:
        self.folder = folder
        self.link = link
        self.bundles = bundles
        self.devices: dict[int, Child] = {}

    def state(self, node: int) -> Path:
        return self.folder / f"state-{node}"

    def join(self, *nodes: int, answer: str = HONEST) -> None:
        """Start devices and wait until the SuperLink sees them."""
        for node in nodes:
            command = [
                sys.executable,
                "-c",
                DEVICE,
                str(self.bundles[node].folder),
                str(self.state(node)),
                answer,
            ]
            self.devices[node] = Child(command, {}, open_log(self.folder / f"device-{node}.log"))
        until(lambda: {f"node-{node}" for node in nodes} <= self.online(), 120)

    def online(self) -> set[str]:
        return {node.name for node in self.link.control.nodes() if node.status == "online"}

    def leave(self, node: int) -> None:
        """Stop a device politely."""
        self.devices.pop(node).stop(grace=15.0)

    def kill(self, node: int) -> None:
        """Pull a device's plug: its supervisor and all its processes at once."""
        child = self.devices.pop(node)
        tree = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        child.stop()

    def process(self, node: int, words: str) -> psutil.Process:
        """Find one process of a device by what stands on its command line."""
        found: list[psutil.Process] = []

        def look() -> bool:
            for process in psutil.Process(self.devices[node].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if words in " ".join(process.cmdline()):
                        found.append(process)
            return bool(found)

        until(look)
        return found[0]

    def said(self, node: int) -> str:
        return (self.folder / f"device-{node}.log").read_text(encoding="utf-8")

    def submit(self, config: RunConfig) -> Submitted:
        return submit(self.folder, self.link.control, config)

    def finish(self, run: Submitted) -> dict[str, Any]:
        """Wait for a run's end; return its summary."""
        follow(self.link.control, run)
        summary: dict[str, Any] = json.loads((run.folder / "summary.json").read_text())
        return summary

    def await_round(self, run: Submitted, number: int) -> None:
        """Wait until a round is committed."""
        until(
            lambda: (run.folder / "run.db").exists() and any(row.round >= number for row in _rounds(run)), 180
        )

    def restart_link(self, stack: contextlib.ExitStack) -> None:
        """Start another SuperLink on the same folder, as ``fedllm server`` does when one has died."""
        self.link = stack.enter_context(open_link(self.folder))

    def close(self) -> None:
        for child in self.devices.values():
            os.kill(child.pid, signal.SIGTERM)
        for child in self.devices.values():
            child.stop(grace=15.0)


def _rounds(run: Submitted) -> list[Any]:
    return list(StoredRun(run.folder).rounds())


@contextlib.contextmanager
def federation(folder: Path, nodes: int) -> Iterator[Federation]:
    bundles = [Bundle.read(path) for path in provision(folder, "localhost", nodes, port=free_port())]
    with open_link(folder) as link:
        made = Federation(folder, bundles, link)
        try:
            yield made
        finally:
            made.close()


def configuration(encoder: Path, texts: Path, **sections: Any) -> RunConfig:
    """Three clients, two a round, three rounds of two short steps."""
    method = sections.get("method", "lora")
    sections.setdefault("name", re.sub(r"\W+", "-", method))
    if method != "fedavg":
        sections.setdefault("tuning", {"rank": 2, "alpha": 4.0, "targets": ("query", "value")})
    return RunConfig.model_validate(
        {
            "clients": 3,
            "rounds": 3,
            "model": {"name": str(encoder)},
            "data": {"path": str(texts), "max_length": 16},
            "training": {"local_steps": 2, "batch_size": 8, "learning_rate": 5e-2},
            "server": {"sample": 2, "deadline_s": 150.0},
            **sections,
        }
    )
