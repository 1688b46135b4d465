"""``fedllm bench simulation``: wall time beside a stock Flower app, and memory per virtual client."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedllm.errors import RunFailed
from simulations.engines.flower import App, run_app

__all__ = ["MEMORY_CLIENTS", "WORK", "Work", "run"]

PEER = App("simulations.bench.peer.server_app:app", "simulations.bench.peer.client_app:app")
MEMORY_CLIENTS = (10, 100, 1000)
_SAMPLING_S = 0.05


@dataclass(frozen=True)
class Work:
    """So much training: each client takes ``steps`` steps of 8 x 64 tokens in each round."""

    clients: int
    rounds: int
    steps: int

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all clients and rounds."""
        return self.clients * self.rounds * self.steps


WORK = {"10 clients x 3 rounds x 2 steps": Work(10, 3, 2), "100 clients x 1 step": Work(100, 1, 1)}


def run(*, repeats: int = 1, clients: Sequence[int] = MEMORY_CLIENTS) -> dict[str, Any]:
    """Run peer, ours and the bare loop one after another, and ours at growing numbers of clients.

    Wall times are of whole commands, start-up included; evaluation and report are off on both sides and
    the model is MiniLM with LoRA r=8 on query and value, in float32. Overhead is wall time beyond the bare
    steps.

    Args:
        repeats: runs of each; medians are reported.
        clients: virtual clients of the memory runs, 20 of them sampled (all, where there are fewer).

    Returns:
        ``work``: per amount of work, seconds and ratios; ``memory``: peak bytes of all processes per number
        of clients, and ``bytes_per_client`` between the last two of them, also in adapters.
    """
    with tempfile.TemporaryDirectory(prefix="fedllm-bench-") as folder:
        root = Path(folder)
        work = {name: _compare(amount, repeats, root) for name, amount in WORK.items()}
        return {"cores": os.cpu_count(), "work": work, "memory": _memory(clients, root)}


def _compare(work: Work, repeats: int, root: Path) -> dict[str, float]:
    peer, ours, bare, steps = [], [], [], []
    for _ in range(repeats):
        peer.append(_seconds(lambda: _peer(work, root)))
        ours.append(_seconds(lambda: _ours(work, root)))
        started = time.perf_counter()
        steps.append(_bare(work))
        bare.append(time.perf_counter() - started)
    return compare(*(statistics.median(values) for values in (peer, ours, bare, steps)))


def compare(peer: float, ours: float, bare: float, steps: float) -> dict[str, float]:
    """Set wall times in relation.

    >>> compare(peer=45.0, ours=20.0, bare=18.0, steps=15.0)["overhead_ratio"]
    0.16666666666666666
    """
    return {
        "peer_s": peer,
        "ours_s": ours,
        "bare_s": bare,
        "bare_steps_s": steps,
        "wall_ratio": ours / peer,
        "overhead_ratio": (ours - steps) / (peer - steps),
    }


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _peer(work: Work, root: Path) -> None:
    run_config = {"clients": work.clients, "rounds": work.rounds, "local-steps": work.steps}
    run_app(PEER, run_config, work.clients, root / "peer.log", workers=os.cpu_count() or 1)


def _bare(work: Work) -> float:
    command = [sys.executable, "-m", "simulations.bench.peer.bare", str(work.total_steps)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    return float(json.loads(output)["steps_s"])


def _ours(work: Work, root: Path, *overrides: str) -> tuple[int, dict[str, Any]]:
    """Run ``fedllm simulate``; return the peak resident bytes of all its processes, and its summary."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        settings = [
            f"clients={work.clients}",
            f"rounds={work.rounds}",
            f"training.local_steps={work.steps}",
            "training.batch_size=8",
            "data.max_length=64",
            "data.partition=iid",
            "evaluation.every=0",
            *overrides,
        ]
        command = [str(Path(sysconfig.get_path("scripts")) / "fedllm"), "simulate", "quickstart", "--json"]
        command += ["--no-report", "--out", str(Path(folder) / "run")]
        command += [part for setting in settings for part in ("--set", setting)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        peak = _PeakMemory(process.pid)
        output, errors = process.communicate()
        if process.returncode != 0:
            raise RunFailed(f"the measured run failed: {errors.decode(errors='replace').strip()[-500:]}")
        return peak.bytes(), json.loads(output)


class _PeakMemory:
    """Peak of the summed resident memory of a process and its children; pages they share count twice."""

    def __init__(self, pid: int) -> None:
        self._peak = 0
        self._thread = threading.Thread(target=self._watch, args=(psutil.Process(pid),), daemon=True)
        self._thread.start()

    def _watch(self, root: psutil.Process) -> None:
        try:
            while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
                self._peak = max(self._peak, sum(map(_resident, [root, *root.children(recursive=True)])))
                time.sleep(_SAMPLING_S)
        except psutil.NoSuchProcess:
            return

    def bytes(self) -> int:
        self._thread.join()
        return self._peak


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _memory(clients: Sequence[int], root: Path) -> dict[str, Any]:
    """Run 20 of ever more virtual clients a round, two rounds of one step."""
    peaks: dict[int, int] = {}
    for count in clients:
        sampled = min(count, 20)
        peaks[count], summary = _ours(Work(count, rounds=2, steps=1), root, f"server.sample={sampled}")
        adapter = summary["bytes"]["dense_up"] / (2 * sampled)
    (fewer, low), (more, high) = list(peaks.items())[-2:]
    per_client = (high - low) / (more - fewer)
    return {
        "peak_rss_bytes": peaks,
        "bytes_per_client": per_client,
        "adapter_bytes": adapter,
        "adapters_per_client": per_client / adapter,
    }
