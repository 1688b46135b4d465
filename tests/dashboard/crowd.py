"""Many runs, for looks and for speed: python -m tests.dashboard.crowd FOLDER [RUNS ROUNDS NODES]."""

from __future__ import annotations

import math
import random
import shutil
import sys
from pathlib import Path

from fedllm.config import RunConfig
from fedllm.runs import database
from fedllm.runs.ledger import Entry
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.runs.writer import RunStore

__all__ = ["copies", "fill", "make"]

METHODS = ("lora", "fwdllm", "fedkd", "fedavg")


def make(folder: Path, rounds: int, nodes: int, *, seed: int, status: str = "finished") -> None:
    """Make one run whose numbers look like a real one's."""
    pick = random.Random(seed)
    method = METHODS[seed % len(METHODS)]
    planned = rounds if status == "finished" else rounds + 20
    config = RunConfig(name=folder.name, clients=nodes, rounds=planned, method=method, seed=seed)
    with (
        RunStore.create(folder, config, {"engine": "loopback"}),
        database.connect(folder, write=True) as held,
    ):
        held.execute("UPDATE meta SET value = ? WHERE key = 'seconds'", (str(3.5 * rounds),))
    with RunStore.open(folder) as store:
        for node in range(nodes):
            device = {"platform": "Linux-6.12-aarch64", "cores": 4.0, "memory_bytes": 8e9, "python": "3.11.2"}
            store.event("joined", f"client {node}", node=node, device=device)
        for number in range(1, rounds + 1):
            accuracy = 0.92 - 0.7 * math.exp(-number / (5 + seed % 9)) + pick.gauss(0, 0.008)
            rows, entries = _round(pick, number, nodes, accuracy)
            accepted = sum(row.status == "accepted" for row in rows)
            record = RoundRecord(
                round=number,
                metrics={"accuracy": accuracy, "loss": 2.2 * math.exp(-number / 20) + 0.2},
                seconds=3.0 + pick.random(),
                participants=accepted,
                rejected=len(rows) - accepted,
                peak_rss_bytes=900_000_000,
                reference_bytes=180_000_000 * accepted,
                details={"loss": 2.0 * math.exp(-number / 20), **_method(pick, method, number, rounds)},
            )
            store.round(record, rows, entries)
        reason = "round 7 missed its quorum of 5 in 4 attempts: no reply before the deadline"
        if status != "running":
            store.finish(status, reason=reason if status == "failed" else None)  # type: ignore[arg-type]


def _method(pick: random.Random, method: str, number: int, rounds: int) -> dict[str, float]:
    """What the method would report of itself."""
    if method == "fwdllm":
        return {
            "directions": 100.0 + 100 * (number // 8),
            "variance": 0.1 + 0.4 / number + 0.05 * pick.random(),
        }
    if method == "fedkd":
        energy = 0.8 + 0.19 * (number - 1) / rounds
        return {"energy": energy, "rank": 3 + 20 * (energy - 0.8) + pick.random()}
    return {}


def _round(
    pick: random.Random, number: int, nodes: int, accuracy: float
) -> tuple[list[NodeRound], list[Entry]]:
    rows, entries = [], []
    for node in range(nodes):
        rejected = node == 3 and number % 5 == 0
        rows.append(
            NodeRound(
                round=number,
                node=node,
                status="rejected" if rejected else "accepted",
                reason="its norm 9.1 exceeds server.max_update_norm = 5" if rejected else None,
                examples=100 + node,
                loss=1.0 - 0.8 * accuracy + pick.gauss(0, 0.02),
                compute_seconds=(2.4 if node == 1 else 0.9) + 0.1 * pick.random(),
                transfer_seconds=0.1 * pick.random(),
                update_norm=1.0 + pick.random(),
                peak_rss_bytes=600_000_000 + 1_000_000 * node,
            )
        )
        entries += [
            Entry(number, node, "up", "fit", "payload", 12_000 + pick.randrange(500), 290_000),
            Entry(number, node, "down", "fit", "payload", 9_000, 290_000),
        ]
    return rows, entries


def copies(root: Path, runs: int, rounds: int, nodes: int) -> None:
    """Make one run and copies of it, which is quicker than making many."""
    make(root / "run-000", rounds, nodes, seed=0)
    for number in range(1, runs):
        shutil.copytree(root / "run-000", root / f"run-{number:03d}")


def fill(root: Path, runs: int = 100, rounds: int = 200, nodes: int = 50) -> None:
    """Make many runs."""
    statuses = ("finished", "finished", "finished", "failed", "stopped", "running")
    for seed in range(runs):
        status = statuses[seed % len(statuses)]
        make(root / f"{METHODS[seed % 4]}-{seed:03d}", rounds, nodes, seed=seed, status=status)


if __name__ == "__main__":
    fill(Path(sys.argv[1]), *map(int, sys.argv[2:]))
