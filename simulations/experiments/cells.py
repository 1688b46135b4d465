"""The runs of an experiment: which there are, where each lies, what is left to do, what that takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fedllm.config import Override, RunConfig
from fedllm.errors import ConfigError
from fedllm.presets import Cost, document
from fedllm.runs.provenance.identity import require_same, require_unedited
from fedllm.runs.reader import Run
from fedllm.runs.records import FILE
from fedllm.wording import suggest
from simulations.costs import Forecast, work
from simulations.experiment import as_baseline, require_no_seed
from simulations.experiments.definition import Cell, Experiment, Variant
from strategies.registry import resolve_run

__all__ = ["CellRun", "Reckon", "forecast", "lay_out", "overrides", "selected", "unfinished"]

_START = 5.0
"""Seconds that a run takes before it computes, and after."""


Reckon = Callable[[RunConfig], Cost]


@dataclass(frozen=True)
class CellRun:
    """One run of a cell: one seed, and of a local baseline one client.

    Attributes:
        cell: name of the cell.
        label: unique within the experiment, as ``--only`` takes it.
        config: what is run.
        folder: where it lies; its last eight letters are a digest of the configuration.
        cost: on one core, estimated.
    """

    cell: str
    label: str
    config: RunConfig
    folder: Path
    cost: Cost

    @property
    def status(self) -> str:
        """As a run's, or ``not begun``."""
        return Run(self.folder).status if (self.folder / FILE).is_file() else "not begun"


def overrides(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Override]:
    """Yield every key of nested settings with its value.

    >>> list(overrides({"rounds": 2, "data": {"alpha": 0.1}}))
    [(('rounds',), 2), (('data', 'alpha'), 0.1)]
    """
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from overrides(value, (*path, key))
        else:
            yield (*path, key), value


def lay_out(
    experiment: Experiment,
    out: Path,
    *,
    variant: Variant | None = None,
    seeds: Sequence[int] = (),
    extra: Sequence[str] = (),
    reckon: Reckon | None = None,
) -> list[CellRun]:
    """Return the runs of an experiment, seed by seed, so that what was interrupted can be compared in pairs.

    Args:
        experiment: what is asked.
        out: folder of the experiment; runs lie in ``out/cells``.
        variant: what is changed of all cells, and maybe the seeds.
        seeds: instead of all that the experiment says.
        extra: further ``key=value``, of every cell.
        reckon: what a run costs whose cell does not say it.

    Raises:
        ConfigError: names the cell whose settings are wrong, or two cells that are the same.
    """
    require_no_seed(extra)
    chosen = tuple(seeds) or (variant.seeds if variant else None)
    asked = {name: chosen or cell.seeds or experiment.seeds for name, cell in experiment.cells.items()}
    found = [
        run
        for seed in sorted({seed for own in asked.values() for seed in own})
        for name, own in asked.items()
        if seed in own
        for run in _runs(experiment, name, seed, out / "cells", variant, extra, reckon)
    ]
    same: dict[str, str] = {}
    for run in found:
        key = run.config.model_copy(update={"name": ""}).to_json()
        if key in same:
            raise ConfigError(f"{same[key]} and {run.label} are the same run: leave one of the cells out")
        same[key] = run.label
    return found


def _runs(
    experiment: Experiment,
    name: str,
    seed: int,
    out: Path,
    variant: Variant | None,
    extra: Sequence[str],
    reckon: Reckon | None,
) -> list[CellRun]:
    cell = experiment.cells[name]
    usual: list[Override] = [*overrides(experiment.base.set), *overrides(cell.set)]
    changes: list[Override] = [*(overrides(variant.set) if variant else ()), *extra]
    identity: list[Override] = [(("seed",), seed), (("name",), name)]
    settings = document(cell.preset or experiment.base.preset)
    try:
        config = resolve_run(settings, [*usual, *changes, *identity])
        share = work(config) / work(resolve_run(settings, [*usual, *identity])) if changes else 1.0
        whole = [(part, one.placed(deployed=False)) for part, one in as_baseline(config, cell.baseline)]
    except ConfigError as error:
        raise ConfigError(f"cells.{name}: {error}") from error
    if config.model.dtype == "auto":
        raise ConfigError(
            f'cells.{name}: model.dtype = "auto" follows the host, but the cells have to be alike: take '
            '"float32" or "bfloat16"'
        )
    # A baseline of one run is called after its cell alone.
    labels = [f"{name}-seed{seed}" + (f"-{part}" if len(whole) > 1 else "") for part, _ in whole]

    def cost(config: RunConfig) -> Cost:
        if reckon is not None and cell.minutes is None:
            return reckon(config)
        return _measured(experiment, cell, share / len(whole))

    return [
        CellRun(name, label, config, out / f"{label}-{_digest(config)}", cost(config))
        for label, (_, config) in zip(labels, whole, strict=True)
    ]


def _digest(config: RunConfig) -> str:
    return hashlib.blake2b(config.to_json().encode(), digest_size=4).hexdigest()


def _measured(experiment: Experiment, cell: Cell, share: float) -> Cost:
    """Return what a share of a cell's work takes, as its file says; nothing where it says nothing."""
    memory, disk = cell.memory_gb or experiment.base.memory_gb, cell.disk_mb or experiment.base.disk_mb
    return Cost(_START + 60 * (cell.minutes or 0.0) * share, 1e9 * (memory or 0.0), 1e6 * (disk or 0.0))


def selected(runs: Sequence[CellRun], patterns: Sequence[str]) -> list[CellRun]:
    """Return the runs that any of the patterns names, by cell or label; all without patterns.

    Raises:
        ConfigError: a pattern names none.
    """
    wanted: set[str] = set()
    for pattern in patterns:
        names = {run.label for run in runs if fnmatch(run.cell, pattern) or fnmatch(run.label, pattern)}
        if not names:
            raise ConfigError(f"--only {pattern} names no cell{suggest(pattern, {run.cell for run in runs})}")
        wanted |= names
    return [run for run in runs if not patterns or run.label in wanted]


def unfinished(runs: Sequence[CellRun], note: Callable[[str], None] = lambda sentence: None) -> list[CellRun]:
    """Return the runs that are still to be made or continued.

    Raises:
        StoreError: a folder holds a run with other settings than the one that belongs there.
    """
    left = [run for run in runs if run.status != "finished"]
    for run in runs:
        if (run.folder / FILE).is_file():
            stored = Run(run.folder).config
            require_unedited(run.folder, stored)
            require_same(run.folder, stored, run.config)
    if len(left) < len(runs):
        note(f"{len(runs) - len(left)} of {len(runs)} runs are finished already")
    return left


def forecast(runs: Sequence[CellRun], jobs: int) -> Forecast:
    """Return what runs will take, ``jobs`` of them side by side: their memory adds up, as does all disk."""
    costs = [run.cost for run in runs]
    memory = sum(sorted((cost.memory for cost in costs), reverse=True)[:jobs])
    seconds, disk = sum(cost.seconds for cost in costs), sum(cost.disk for cost in costs)
    return Forecast(len(runs), Cost(seconds, memory, disk), ())
