"""One command, one or many runs: repeats over seeds, small sweeps, and baselines on the same split."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedllm.config import RunConfig, parse_override
from fedllm.errors import ConfigError
from strategies.registry import resolve_run

__all__ = ["Baseline", "Planned", "free_folder", "parse_seeds", "plan", "sweep"]

Baseline = Literal["local", "central"]


@dataclass(frozen=True)
class Planned:
    """A run to be made."""

    config: RunConfig
    folder: Path


def plan(
    document: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    out: Path | None = None,
    seeds: Sequence[int] = (),
    baseline: Baseline | None = None,
) -> list[Planned]:
    """Lay out the runs that a command asks for.

    Args:
        document: the settings to start from.
        overrides: ``a.b=value``; several values, ``a.b=1,2,3``, make a run each.
        out: folder of the one run, or of all of them; unset takes ``runs/NAME``.
        seeds: a run each; empty takes the configuration's own.
        baseline: instead of the federation, all data in one place or every client for itself.

    Raises:
        ConfigError: an override or a combination is wrong.
    """
    runs: list[tuple[str, RunConfig]] = []
    for values in sweep(overrides):
        for seed in seeds or (None,):
            chosen = [*values, *([] if seed is None else [f"seed={seed}"])]
            config = resolve_run(document, chosen)
            label = "-".join([*_varying(values, overrides), *([] if seed is None else [f"seed{seed}"])])
            runs += [("-".join(filter(None, (label, own))), c) for own, c in _baseline(config, baseline)]
    name = runs[0][1].name + (f"-{baseline}" if baseline else "")
    root = out if out is not None else free_folder(Path("runs") / name)
    if len(runs) == 1:
        return [Planned(runs[0][1], root)]
    return [Planned(config, root / label) for label, config in runs]


def free_folder(folder: Path) -> Path:
    """Return ``folder``, or the first of ``folder-2``, ``folder-3``, ... that does not exist."""
    candidates = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    return folder if not folder.exists() else next(path for path in candidates if not path.exists())


def parse_seeds(text: str) -> list[int]:
    """Read seeds as a range, a list, or both.

    >>> parse_seeds("0..4")
    [0, 1, 2, 3, 4]
    >>> parse_seeds("0,7..8")
    [0, 7, 8]
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, separator, last = part.partition("..")
        try:
            seeds += range(int(first), int(last) + 1) if separator else [int(first)]
        except ValueError:
            raise ConfigError(f"--seeds takes numbers and ranges such as 0..4 or 1,3; got {text!r}") from None
    return seeds


def sweep(overrides: Iterable[str]) -> list[list[str]]:
    """Return every combination of the values that overrides list.

    >>> sweep(["training.local_steps=1,2", "seed=3"])
    [['training.local_steps=1', 'seed=3'], ['training.local_steps=2', 'seed=3']]
    >>> sweep(["codec.up=low_rank(rank=2, method=svd)"])
    [['codec.up=low_rank(rank=2, method=svd)']]
    """
    choices = []
    for override in overrides:
        key, _, value = override.partition("=")
        _, parsed = parse_override(override)
        values = _split(value) if isinstance(parsed, str) and '"' not in value else [value]
        choices.append([f"{key}={one.strip()}" for one in values])
    return [list(combination) for combination in itertools.product(*choices)]


def _split(text: str) -> list[str]:
    """Split at commas outside parentheses and brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _varying(values: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Name the values that differ between the runs of a sweep, fit for a folder."""
    chosen = [value for value, override in zip(values, overrides, strict=True) if value != override]
    return [
        "".join(c if c.isalnum() or c in "._" else "_" for c in value.rpartition(".")[2]) for value in chosen
    ]


def _baseline(config: RunConfig, baseline: Baseline | None) -> list[tuple[str, RunConfig]]:
    """Turn a federation into its baseline: as many steps, the same split, no messages that matter."""
    if baseline is None:
        return [("", config)]
    document = config.to_document()
    document.update(clients=1, codec={}, server={})
    if baseline == "central":
        training = document["training"]
        document["data"]["partition"] = "iid"
        document["training"] = {**training, "local_steps": config.training.local_steps * config.cohort}
        return [("central", resolve_run(document))]
    runs = []
    for client in range(config.clients):
        document["data"]["part"] = [client, config.clients]
        runs.append((f"client{client}", resolve_run(document)))
    return runs
