"""Runs with numbers chosen by hand, so that a reader's arithmetic can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fedllm.config import RunConfig, as_name
from fedllm.runs.folder import write_partition
from fedllm.runs.ledger import Entry
from fedllm.runs.reader import Run
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.runs.writer import RunStore


def make_run(
    folder: Path,
    accuracies: tuple[float, ...] = (0.5, 0.7, 0.9),
    *,
    seed: int = 0,
    up: int = 100,
    metric: str = "accuracy",
    also: Mapping[str, float] = MappingProxyType({}),
    status: str = "finished",
    simulated: float | None = None,
    first: int = 1,
    **config: object,
) -> Run:
    """Two clients a round: node 1's reply counts, node 0 is rejected; each sends ``up`` bytes, gets 300.

    Args:
        simulated: seconds that each round takes on simulated devices; unset simulates none.
        first: number of the first round that was scored; 0 for one that scored the start.
    """
    given: dict[str, object] = {
        "name": as_name(folder.name),
        "clients": 3,
        "rounds": len(accuracies) - (first == 0),
        **config,
    }
    with RunStore.create(folder, RunConfig(seed=seed, **given), {"engine": "loopback"}) as store:  # type: ignore[arg-type]
        write_partition(store.folder, [[0, 1], [2], []], [0, 1, 1], ["<b>sport</b>", "tech"])
        for number, value in enumerate(accuracies, start=first):
            nodes = [
                NodeRound(round=number, node=0, status="rejected", reason="norm <9> exceeds 5"),
                NodeRound(round=number, node=1, status="accepted", examples=8, loss=0.25),
            ]
            entries = [Entry(number, node, "up", "fit", "update", up, 400) for node in (0, 1)]
            entries += [Entry(number, node, "down", "fit", "update", 300) for node in (0, 1)]
            metrics = {metric: value, "loss": 1 - value / 2, **also}
            details = {} if simulated is None else {"seconds_simulated": simulated}
            record = RoundRecord(
                round=number, metrics=metrics, seconds=2.0, participants=1, rejected=1, details=details
            )
            store.round(record, nodes, entries)
        if status != "running":
            reason = "quorum lost in round 3" if status == "failed" else None
            store.finish(status, reason=reason)  # type: ignore[arg-type]
    return Run(folder)
