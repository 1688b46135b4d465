"""``fedllm bench device``: the memory of a whole device, idle and at its peak under each method.

One SuperLink and one device on this host, ``fedllm client`` with every process that it starts, as it would
run on a device of its own. MiniLM, batches of 8 x 64 tokens of BBC News for every method, one thread.

Two figures are given. ``rss_bytes`` adds up what the system calls resident, so that a library which three
processes have mapped counts three times. ``bytes`` counts a file's pages once, for the process that holds the
most of them: what the device needs. The kernel's own proportional share (PSS) would also divide by the
processes of the server, which share these libraries here and on a real device do not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from client.device.bundle import Bundle
from fedllm.config import RunConfig
from fedllm.errors import RunFailed
from fedllm.host.processes import Child, open_log
from server.federation.control import Control
from server.federation.link import open_link
from server.federation.provision import provision
from server.federation.submit import follow, submit
from strategies.registry import resolve_run

__all__ = ["METHODS", "Held", "held", "run"]

METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg", "tuning": {"peft": "full"}},
    "lora": {"method": "lora"},
    "fwdllm": {"method": "fwdllm", "fwdllm": {"estimator": "antithetic"}},
    "fwdllm_jvp": {"method": "fwdllm"},
    "fedkd": {"method": "fedkd", "tuning": {"peft": "full"}},
}
"""What is measured: LoRA's adapters and FwdLLM's are the same."""

IDLE_SECONDS = 5.0
_LOOKS_APART = 0.1
_WORKER = "client.resident"


class Held(NamedTuple):
    """What processes hold at one moment."""

    bytes: int
    """Pages of a file that several have mapped counted once."""
    rss_bytes: int
    """Summed over processes, what they share counted for each."""
    processes: int
    worker_bytes: int
    """Largest resident set of the resident worker so far; 0 where there is none."""


def run(*, rounds: int = 2, methods: tuple[str, ...] = tuple(METHODS)) -> dict[str, Any]:
    """Measure a device; some minutes.

    Args:
        rounds: of each method.
        methods: keys of :data:`METHODS`.

    Returns:
        By situation (``idle``, each method, ``idle_again``) the largest ``bytes``, ``rss_bytes``,
        ``processes`` and ``worker_bytes`` that were seen in it.
    """
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as name:
        folder = Path(name)
        with _federation(folder) as (control, device):
            found = {"idle": _watch(device, partial(time.sleep, IDLE_SECONDS))}
            for method in methods:
                found[method] = _watch(device, partial(_work, control, folder, method, rounds))
                _await(lambda: held(device).worker_bytes == 0, "the worker did not end", IDLE_SECONDS + 60)
            found["idle_again"] = _watch(device, partial(time.sleep, IDLE_SECONDS))
    return {situation: seen._asdict() for situation, seen in found.items()}


def held(pid: int) -> Held:
    """Look at a process and all that it started."""
    files: dict[str, int] = {}
    anonymous = resident = processes = worker = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            mapped: dict[str, int] = {}
            for area in process.memory_maps(grouped=False):
                if area.path.startswith("/"):
                    mapped[area.path] = mapped.get(area.path, 0) + area.rss - area.anonymous
                    anonymous += area.anonymous
                else:
                    anonymous += area.rss
                resident += area.rss
            for path, size in mapped.items():
                files[path] = max(files.get(path, 0), size)
            processes += 1
            if _WORKER in process.cmdline():
                worker = _high_water(process.pid)
    return Held(anonymous + sum(files.values()), resident, processes, worker)


def _high_water(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _watch(pid: int, work: Callable[[], None]) -> Held:
    """Look again and again while something is done; return the largest of each figure."""
    done = threading.Event()
    seen: list[Held] = []

    def look() -> None:
        while not done.wait(_LOOKS_APART):
            seen.append(held(pid))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return Held(*(max(column) for column in zip(*seen, strict=True)))


@contextmanager
def _federation(folder: Path) -> Iterator[tuple[Control, int]]:
    """Serve a federation on a free port, with one device; yields the device's process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    bundle = Bundle.read(provision(folder, "localhost", 1, port=port)[0])
    command = [str(Path(sysconfig.get_path("scripts")) / "fedllm"), "client", str(bundle.folder)]
    command += ["--state", str(folder / "state"), "--threads", "1", "--idle-unload", str(IDLE_SECONDS)]
    with open_link(folder) as link:
        device = Child(command, {"PYTHONPATH": os.pathsep.join(_roots())}, open_log(folder / "device.log"))
        try:
            _await(lambda: [n for n in link.control.nodes() if n.status == "online"], "no device came", 120)
            yield link.control, device.pid
        finally:
            device.stop(grace=15.0)


def _roots() -> list[str]:
    """Where the packages that measure were found: the device is to run the same."""
    return list(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))


def _await(condition: Callable[[], object], otherwise: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RunFailed(f"{otherwise} within {seconds:.0f} s")
        time.sleep(0.2)


def _work(control: Control, folder: Path, method: str, rounds: int) -> None:
    follow(control, submit(folder, control, _configuration(method, rounds)))


def _configuration(method: str, rounds: int) -> RunConfig:
    return resolve_run(
        {
            "name": method.replace("_", "-"),
            "clients": 1,
            "rounds": rounds,
            "data": {"name": "bbcnews", "max_length": 64},
            "tuning": {"rank": 8, "alpha": 16.0, "targets": ["query", "value"]},
            "training": {"local_steps": 4, "batch_size": 8},
            "evaluation": {"every": 0},
            "server": {"deadline_s": 600.0},
            **METHODS[method],
        }
    )
