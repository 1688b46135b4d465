"""The papers' experiments, each a set of presets over several seeds, and the table that compares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedllm.errors import ConfigError
from fedllm.run_database import FILE
from fedllm.runs import Run
from simulations.catalogue import document
from simulations.experiment import Planned
from strategies.registry import resolve_run

__all__ = ["EXPERIMENTS", "Experiment", "Scale", "lay_out", "unfinished"]

Scale = Literal["cpu", "paper"]


@dataclass(frozen=True)
class Experiment:
    """Presets to compare; the first is the reference.

    Attributes:
        presets: by name.
        once: further presets, which get the first seed only.
        measured: overrides that every run gets, so that differences of half a point can be seen.
        paper: overrides for the paper's own models and data, which need a GPU and a network.
    """

    presets: tuple[str, ...]
    once: tuple[str, ...] = ()
    measured: tuple[str, ...] = ("data.test_fraction=0.4",)
    paper: tuple[str, ...] = ()


EXPERIMENTS = {
    "lora": Experiment(
        ("quickstart", "lora-30x"),
        once=("lora-int4", "lora-lowrank", "lora-mixed-ranks", "quickstart-full"),
        measured=("data.test_fraction=0.4", "evaluation.every=8"),
        paper=("model.name=roberta-base", "data.name=fancyzhx/ag_news", "clients=100", "server.sample=10"),
    ),
    "fwdllm": Experiment(
        ("fwdllm-backprop", "fwdllm"),
        once=("fwdllm-cold",),
        paper=("model.name=distilbert-base-uncased", "data.name=fancyzhx/ag_news", "clients=100"),
    ),
    "fedkd": Experiment(
        ("fedavg-teacher", "fedkd", "student-alone"),
        once=("fedkd-literal", "teacher-local"),
        paper=("model.name=bert-base-uncased", "data.name=fancyzhx/ag_news"),
    ),
}


def lay_out(
    name: str, seeds: Sequence[int], scale: Scale, out: Path, extra: Sequence[str] = ()
) -> list[Planned]:
    """Return the runs of an experiment, seed by seed, so that what was interrupted can be compared in pairs.

    Args:
        name: a key of :data:`EXPERIMENTS`.
        seeds: of every preset but those that are run once.
        scale: ``cpu`` takes the bundled model and texts.
        out: folder of all runs.
        extra: further overrides, of every run.

    Raises:
        ConfigError: there is no such experiment.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"there is no experiment {name!r}; experiments are {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    order = [(preset, seed) for seed in seeds for preset in experiment.presets]
    order += [(preset, seeds[0]) for preset in experiment.once]
    overrides = [*experiment.measured, *(experiment.paper if scale == "paper" else ()), *extra]
    return [
        Planned(resolve_run(document(preset), [*overrides, f"seed={seed}"]), out / f"{preset}-seed{seed}")
        for preset, seed in order
    ]


def unfinished(
    planned: Sequence[Planned], note: Callable[[str], None] = lambda sentence: None
) -> list[Planned]:
    """Return the runs that are still to be made or continued, so that an experiment can be interrupted."""
    left = []
    for run in planned:
        if (run.folder / FILE).is_file() and Run(run.folder).status == "finished":
            note(f"{run.folder.name} is finished already")
        else:
            left.append(run)
    return left
