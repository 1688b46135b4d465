"""Writes rounds and checkpoints until killed. ``test_kill.py`` names folders on its standard input."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from fedllm.config import RunConfig
from fedllm.runs import checkpoint
from fedllm.runs.ledger import Entry
from fedllm.runs.records import FILE, NodeRound, RoundRecord
from fedllm.runs.writer import RunStore

CONFIG = RunConfig(clients=3, rounds=10**6)


def state_after(round: int) -> torch.Tensor:
    return torch.full((50, 50), float(round))


def write(folder: Path) -> None:
    fresh = not (folder / FILE).exists()
    store = RunStore.create(folder, CONFIG) if fresh else RunStore.open(folder)
    last = checkpoint.latest(folder / "checkpoints")
    store.truncate(last.number if last else -1)
    while True:
        round = store.last_round + 1
        nodes = [NodeRound(round=round, node=node, status="accepted") for node in range(3)]
        entries = [Entry(round, node, "up", "fit", "update", round) for node in range(3)]
        store.round(RoundRecord(round=round, metrics={"loss": 1.0 / round}), nodes, entries)
        checkpoint.save(
            folder / "checkpoints", round, {"tensors": {"w": state_after(round)}}, {"round": round}
        )


def main() -> None:
    # torch is imported once; every kill then costs a fork.
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            write(Path(line.strip()))
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
