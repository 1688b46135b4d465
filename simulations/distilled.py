"""What FedKD's table needs beside the comparison of every setting with the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedllm.runs import Run
from fedllm.wording import human_bytes
from simulations.compare import paired

__all__ = ["frozen_reference", "gain", "notes", "sentences"]


def notes(runs: Sequence[Run]) -> dict[str, Any]:
    """Return ``frozen_reference`` and ``gain`` of the runs of ``fedllm reproduce fedkd``."""
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(run.config.name, []).append(run)
    reference = named.pop("fedavg-teacher")
    return {
        "frozen_reference": frozen_reference(reference, named),
        "gain": gain(named["student-alone"], named["fedkd"]),
    }


def frozen_reference(reference: Sequence[Run], others: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Return what the reference would have moved with frozen embedding tables: arithmetic, not a run.

    FedKD's students leave their embeddings alone while FedAvg of the whole teacher sends them; this compares
    like with like. The tables are a fixed share of every uncompressed message.

    Args:
        reference: runs that send whole models.
        others: runs to compare, by name.

    Returns:
        ``bytes`` (both directions, mean over seeds), ``parameters`` and ``embedding_parameters`` of the
        model, and ``ratio``: by name, how many times fewer bytes were moved than this.
    """
    whole, tables = _count(reference[0])
    moved = [run.summary["bytes"] for run in reference]
    left = fmean(b["up"] + b["down"] - (b["dense_up"] + b["dense_down"]) * tables / whole for b in moved)
    ratio = {
        name: left / fmean(run.summary["bytes"]["up"] + run.summary["bytes"]["down"] for run in runs)
        for name, runs in others.items()
    }
    return {"bytes": left, "parameters": whole, "embedding_parameters": tables, "ratio": ratio}


def gain(alone: Sequence[Run], distilled: Sequence[Run]) -> dict[str, Any]:
    """Return by how much distillation changed the student's accuracy: mean and interval, paired by seed."""
    before, after = (
        {run.config.seed: run.summary["metrics"]["accuracy"] for run in runs} for runs in (alone, distilled)
    )
    found = paired(before, after)
    assert found is not None  # both were run over the same seeds
    return dataclasses.asdict(found)


def sentences(found: Mapping[str, Any]) -> str:
    """Say what :func:`notes` found.

    >>> print(sentences({"gain": {"mean": 0.01, "low": -0.02, "high": 0.04, "n": 5}, "frozen_reference":
    ...     {"bytes": 3e6, "parameters": 9, "embedding_parameters": 3, "ratio": {"fedkd": 4.25}}}))
    student distilled - student alone: +0.0100 [-0.0200, +0.0400], 5 seeds
    like for like, embeddings frozen in fedavg-teacher too, by arithmetic: 3 MB (6 of 9 parameters)
    fewer bytes than that: fedkd 4.25x
    """
    gain, frozen = found["gain"], found["frozen_reference"]
    spread = f" [{gain['low']:+.4f}, {gain['high']:+.4f}]" if gain["low"] is not None else ""
    sent = f"{frozen['parameters'] - frozen['embedding_parameters']:,} of {frozen['parameters']:,} parameters"
    fewer = ", ".join(f"{name} {ratio:.3g}x" for name, ratio in frozen["ratio"].items())
    return (
        f"student distilled - student alone: {gain['mean']:+.4f}{spread}, {gain['n']} seeds\n"
        "like for like, embeddings frozen in fedavg-teacher too, by arithmetic: "
        f"{human_bytes(frozen['bytes'])} ({sent})\n"
        f"fewer bytes than that: {fewer}"
    )


def _count(run: Run) -> tuple[int, int]:
    """Return the parameters of a run's base model with its head, and those of them in embedding tables."""
    from torch import nn

    from fedllm import data, models

    labels = data.load(run.config.data, run.config.model.task).label_names
    module = models.load(run.config, labels).module
    tables = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Embedding))
    return sum(parameter.numel() for parameter in module.parameters()), tables
