"""What came out of an experiment: means over seeds, paired differences, verdicts on what a paper claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

from fedllm.errors import ConfigError
from fedllm.measures import measure
from fedllm.runs.reader import Run
from fedllm.wording import human_bytes, human_seconds, number, times
from simulations.experiments.cells import CellRun
from simulations.experiments.definition import Claim, Difference, Experiment
from simulations.results.intervals import Interval, by_seed, interval, paired

__all__ = ["columns", "findings", "moved", "said", "shown", "spread", "title", "value"]

_ROUNDING = 1e-12
"""What sums of floating-point numbers may be off by: a difference of -1e-17 is none."""
Values = dict[int, float]
"""Of a cell, by seed."""


def value(run: Run, name: str) -> float | None:
    """Return a number of a finished run; None where the run did not measure it.

    Args:
        run: the run.
        name: keys of ``summary.json`` joined by dots; ``bytes.total``, both ways; ``clients.NAME``, what
            clients told of the last round, as their mean; or ``start.NAME``, a metric before the first round.

    Raises:
        ConfigError: a summary has no such key.
    """
    summary = run.summary
    summary["bytes"]["total"] = summary["bytes"]["up"] + summary["bytes"]["down"]
    rounds = run.rounds()
    summary["clients"] = rounds[-1].details.get("clients", {})
    summary["start"] = rounds[0].metrics if rounds[0].round == 0 else {}
    section, _, key = name.partition(".")
    if not isinstance(summary.get(section), Mapping):
        raise ConfigError(f"measure = {name!r} is no section of summary.json and a key in it")
    found = summary[section].get(key)
    return None if found is None else float(found)


def moved(name: str) -> bool:
    """Whether a measure is of what crosses the network, of which a run without a federation has none."""
    return name.startswith("bytes.")


def title(name: str) -> str:
    """Return what a measure is called, with its unit.

    >>> title("metrics.accuracy"), title("bytes.up"), title("clients.teacher_accuracy")
    ('accuracy', 'bytes up', "teacher accuracy, clients' own texts")
    """
    section, _, key = name.partition(".")
    if section == "clients":
        return f"{key.replace('_', ' ')}, clients' own texts"
    told = {"bytes.up": "bytes up", "bytes.down": "bytes down", "bytes.total": "bytes, both ways"}
    told |= {"memory.peak_rss_bytes": "peak memory", "seconds.client_compute": "computing"}
    return measure(key).title if section == "metrics" else told.get(name, name)


def said(name: str, value: float | None) -> str:
    """Write a value of a measure for people.

    >>> said("bytes.up", 1.5e6), said("metrics.accuracy", 0.95), said("metrics.accuracy", None)
    ('1.5 MB', '0.9500', '-')
    """
    if value is None:
        return "-"
    if name.startswith("bytes.") or name.endswith("_bytes"):
        return human_bytes(value)
    if name.startswith("seconds."):
        return human_seconds(value)
    return f"{value:.4f}" if abs(value) < 10 else number(value, 5)


def columns(metric: str, also: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the measures that the table of cells shows, the one first that decides, then further ones."""
    rest = ("bytes.up", "bytes.total", "memory.peak_rss_bytes", "seconds.client_compute")
    return (f"metrics.{metric}", *(() if metric == "loss" else ("metrics.loss",)), *also, *rest)


def findings(
    experiment: Experiment, runs: Sequence[CellRun], failed: Mapping[str, str], unjudged: str = ""
) -> dict[str, Any]:
    """Return as JSON what the finished runs of an experiment say.

    Args:
        experiment: what was asked.
        runs: all of it, finished or not.
        failed: why runs failed, by label.
        unjudged: why no claim can be judged by these runs, where none can.
    """
    stored = {run.label: Run(run.folder) for run in runs if run.status == "finished"}
    metric = next(run.config.metric for run in runs)
    table = columns(metric, experiment.columns)

    def values(cell: str, name: str) -> Values:
        own = [
            (run.config.seed, stored[run.label]) for run in runs if run.cell == cell and run.label in stored
        ]
        if moved(name) and experiment.cells[cell].baseline:
            return {}
        told = ((seed, value(run, name)) for seed, run in own)
        return by_seed((seed, found) for seed, found in told if found is not None)

    return {
        "metric": metric,
        "columns": list(table),
        "cells": [
            {
                "name": name,
                "title": cell.title,
                "baseline": cell.baseline,
                "runs": sum(run.cell == name for run in runs),
                "finished": sum(run.cell == name for run in runs if run.label in stored),
                "measured": {column: spread(values(name, column)) for column in table},
            }
            for name, cell in experiment.cells.items()
        ],
        "differences": [_compared(one, values) for one in experiment.differences],
        "claims": [_judged(one, values, unjudged) for one in experiment.claims],
        "failed": dict(failed),
    }


def spread(values: Values) -> dict[str, Any] | None:
    """Return mean, standard deviation, 95 % interval and the values themselves; None without any."""
    if not values:
        return None
    own = list(values.values())
    deviation = stdev(own) if len(own) > 1 else None
    return {**interval(own).to_json(), "deviation": deviation, "by_seed": values}


def _compared(one: Difference, values: Any) -> dict[str, Any]:
    of, against = values(one.of, one.measure), values(one.against, one.measure)
    found: Interval | None
    if one.kind == "difference":
        found = paired(against, of)
    else:
        over, under = against, of
        if one.kind == "share_of_gain":
            start = one.measure.replace("metrics.", "start.")
            over, under = _gained(values(one.of, start), of), _gained(values(one.against, start), against)
        seeds = [seed for seed in sorted(over.keys() & under.keys()) if under[seed]]
        found = interval([over[seed] / under[seed] for seed in seeds]) if seeds else None
    return {**one.model_dump(), "found": None if found is None else found.to_json()}


def _gained(start: Values, end: Values) -> Values:
    return {seed: end[seed] - start[seed] for seed in end.keys() & start.keys()}


def _judged(claim: Claim, values: Any, unjudged: str) -> dict[str, Any]:
    compared = _compared(claim, values)
    return {**compared, "verdict": _verdict(claim, compared["found"], unjudged)}


def _verdict(claim: Claim, found: Mapping[str, Any] | None, unjudged: str) -> str:
    if unjudged:
        return f"not judged: {unjudged}"
    if claim.not_comparable:
        return f"not comparable: {claim.not_comparable}"
    if found is None:
        return f"not judged: {claim.of} and {claim.against} have no seed in common that is finished"
    assert claim.at_least is not None  # the reader saw to that
    lacking = claim.at_least - found["mean"]
    if lacking <= _ROUNDING:
        return "met"
    return f"missed by {_told(claim.kind, claim.measure, lacking)}"


def _told(kind: str, measure: str, amount: float) -> str:
    if kind == "times_fewer":
        return times(amount)
    return f"{amount:.3f}" if kind == "share_of_gain" else said(measure, amount)


def shown(one: Mapping[str, Any]) -> str:
    """Write a difference or a ratio with its interval, where that means something.

    >>> found = {"mean": 0.01, "low": -0.02, "high": 0.04, "n": 5, "means_something": True}
    >>> shown({"kind": "difference", "measure": "metrics.accuracy", "found": found})
    '+0.0100 [-0.0200, +0.0400]'
    """
    found = one["found"]
    if found is None:
        return "-"
    ends = [found["mean"], *((found["low"], found["high"]) if found["means_something"] else ())]
    told = [_told(one["kind"], one["measure"], abs(end)) for end in ends]
    if one["kind"] != "times_fewer":
        told = [("+" if end >= -_ROUNDING else "-") + text for end, text in zip(ends, told, strict=True)]
    return told[0] + (f" [{told[1]}, {told[2]}]" if len(told) > 1 else "")
