"""What runs will take, said before they start: from what their presets took, by the work there is to do."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedllm.config import RunConfig
from fedllm.presets import Cost, document, presets
from fedllm.wording import human_bytes, human_seconds
from strategies.registry import resolve_run

__all__ = ["Forecast", "forecast", "sentences", "work"]

WORTH_SAYING = Cost(180.0, 4e9, 1e9)
"""Time, memory or disk from which on a single run is announced."""


@dataclass(frozen=True)
class Forecast:
    """What runs will take together, one after the other.

    Attributes:
        runs: how many.
        cost: seconds and bytes of disk are sums, memory is the largest.
        unknown: presets of the runs that are left out, since nothing was measured that is like them.
    """

    runs: int
    cost: Cost
    unknown: tuple[str, ...]

    @property
    def large(self) -> bool:
        """Whether it is worth saying before the start."""
        said, least = self.cost, WORTH_SAYING
        return (
            self.runs > 1
            or said.seconds >= least.seconds
            or said.memory >= least.memory
            or said.disk >= least.disk
        )


def work(config: RunConfig) -> float:
    """Return the tokens that a run's clients train on, times the directions that each is looked at in.

    >>> work(RunConfig(rounds=2, clients=5)) / work(RunConfig(rounds=1, clients=5))
    2.0
    """
    training = config.training
    texts = config.rounds * config.answers * training.local_steps * training.batch_size
    return float(texts * config.data.max_length * config.options.get("directions", 1))


def forecast(runs: Sequence[tuple[str, RunConfig]]) -> Forecast:
    """Return what runs will take, each with the preset that it was made from.

    The preset's own figures are scaled by the work there is to do. A run with another model, other data or
    another method than its preset, or of a preset without figures, is left out and named.
    """
    found = {preset.name: preset for preset in presets()}
    costs, unknown = [], []
    for name, config in runs:
        measured = found[name].cost if name in found else None
        like = resolve_run(document(name)) if measured is not None else None
        if measured is None or like is None or _kind(like) != _kind(config):
            unknown.append(name)
            continue
        costs.append(Cost(measured.seconds * work(config) / work(like), measured.memory, measured.disk))
    seconds, disk = sum(cost.seconds for cost in costs), sum(cost.disk for cost in costs)
    memory = max((cost.memory for cost in costs), default=0.0)
    return Forecast(len(runs), Cost(seconds, memory, disk), tuple(sorted(set(unknown))))


def _kind(config: RunConfig) -> tuple[object, ...]:
    model = config.model.model_dump(exclude={"dtype"})  # "auto" is settled as a run starts
    return (config.method, model, config.tuning, config.data.name, config.data.path)


def sentences(said: Forecast, folder: Path, jobs: int = 1) -> list[str]:
    """Say a forecast, and what this machine lacks of it.

    Args:
        said: the forecast.
        folder: where the runs will lie; need not exist.
        jobs: runs side by side, a core each.
    """
    cost, left_out = said.cost, ", ".join(said.unknown)
    runs = f"{said.runs} runs" if said.runs > 1 else "1 run"
    if not cost.seconds:
        return [f"{runs}: no estimate of time, memory and disk, since nothing like {left_out} was measured"]
    time = human_seconds(60 * max(1, round(cost.seconds / jobs / 60)))
    told = [
        f"{runs}: about {time} on {'one core' if jobs == 1 else f'{jobs} cores'}, "
        f"{human_bytes(cost.memory)} of memory and {human_bytes(cost.disk)} of disk"
        + (f"; without {left_out}, of which nothing like it was measured" if left_out else "")
    ]
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, spare = shutil.disk_usage(there).free, psutil.virtual_memory().available
    if free < cost.disk:
        told.append(f"warning: only {human_bytes(free)} of disk are free at {there}")
    if spare < cost.memory:
        told.append(f"warning: only {human_bytes(spare)} of memory are free")
    return told
