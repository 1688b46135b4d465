"""One command, one or many runs: repeats over seeds, small sweeps, and baselines on the same split."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedllm.config import RunConfig, as_name, parse_override
from fedllm.errors import ConfigError
from fedllm.runs.provenance.identity import difference
from strategies.registry import method_options, resolve_run

__all__ = [
    "Baseline",
    "Planned",
    "as_baseline",
    "free_folder",
    "parse_seeds",
    "plan",
    "require_no_seed",
    "sweep",
]

Baseline = Literal["local", "central"]

_LABEL = 60
"""Characters of a run's name that tell a sweep's values."""


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
    choose: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> list[Planned]:
    """Lay out the runs that a command asks for.

    Args:
        document: the settings to start from.
        overrides: ``a.b=value``; several values, ``a.b=1,2,3``, make a run each.
        out: folder of the one run, or of all of them, each called after the values that make it; unset
            takes ``runs/NAME``.
        seeds: a run each; empty takes the configuration's own.
        baseline: instead of the federation, all data in one place or every client for itself.
        choose: gives a federation what nobody set; its baseline follows it.

    Raises:
        ConfigError: an override or a combination is wrong, or a run is asked for twice.
    """
    combinations = sweep(overrides)
    if seeds:
        require_no_seed(overrides)
    runs: list[tuple[str, RunConfig]] = []
    for values, label in zip(combinations, _labels(combinations, overrides), strict=True):
        for seed in seeds or (None,):
            repeat = [] if seed is None else [f"seed={seed}"]
            config = choose(resolve_run(document, [*values, *repeat]))
            if label:
                config = config.model_copy(update={"name": f"{config.name}-{label}"[:100]})
            parts = [label, *(text.replace("=", "") for text in repeat)]
            runs += [
                ("-".join(filter(None, [*parts, own])), one) for own, one in as_baseline(config, baseline)
            ]
    _require_different(runs)
    name = resolve_run(document, combinations[0]).name + (f"-{baseline}" if baseline else "")
    root = out if out is not None else free_folder(Path("runs") / name)
    if len(runs) == 1:
        return [Planned(runs[0][1], root)]
    return [Planned(config, root / label) for label, config in runs]


def _require_different(runs: Sequence[tuple[str, RunConfig]]) -> None:
    """Refuse to make one run twice: it would say nothing, and count as a repeat."""
    for (one, config), (other, same) in itertools.combinations(runs, 2):
        if difference(config, same, ignoring=("name",)) is None:
            raise ConfigError(f"{one} and {other} are the same run: give every value and every seed once")


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
            found = range(int(first), int(last) + 1) if separator else [int(first)]
        except ValueError:
            raise ConfigError(f"--seeds takes numbers and ranges such as 0..4 or 1,3; got {text!r}") from None
        if not found:
            raise ConfigError(f"--seeds {part} runs backwards; write {last}..{first}")
        seeds += found
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ConfigError(f"--seeds {text} asks for seed {twice[0]} twice: give every seed once")
    return seeds


def require_no_seed(overrides: Iterable[str]) -> None:
    """Refuse a seed among the overrides of a command that is given seeds of its own."""
    if any(parse_override(override)[0] == ["seed"] for override in overrides):
        raise ConfigError("--seeds and --set seed=... both say the seed: give one of them")


def sweep(overrides: Iterable[str]) -> list[list[str]]:
    """Return every combination of the values that overrides list.

    The name of a file that is there is one value, commas or not; so is what stands in quotes.

    Raises:
        ConfigError: a listed value is empty.

    >>> sweep(["training.local_steps=1,2", "seed=3"])
    [['training.local_steps=1', 'seed=3'], ['training.local_steps=2', 'seed=3']]
    >>> sweep(["codec.up=low_rank(rank=2, method=svd)"])
    [['codec.up=low_rank(rank=2, method=svd)']]
    """
    choices = []
    for override in overrides:
        key, _, value = override.partition("=")
        _, parsed = parse_override(override)
        listed = isinstance(parsed, str) and '"' not in value and not os.path.exists(parsed)
        values = [one.strip() for one in _split(value)] if listed else [value]
        if len(values) > 1 and not all(values):
            raise ConfigError(f"--set {override}: a value is empty; put a text with commas in quotes")
        choices.append([f"{key}={one}" if listed else override for one in values])
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


def _labels(combinations: Sequence[Sequence[str]], overrides: Sequence[str]) -> list[str]:
    """Name each combination by the keys and values that a sweep varies: fit for a folder, and unique."""
    told = [
        "-".join(value for value, given in zip(combination, overrides, strict=True) if value != given)
        for combination in combinations
    ]
    names = [as_name(text) if text else "" for text in told]
    return [
        # Too long, or alike once what a folder's name may not hold is gone.
        f"{name[:_LABEL]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
        if len(name) > _LABEL or names.count(name) > 1
        else name
        for name, text in zip(names, told, strict=True)
    ]


def as_baseline(config: RunConfig, kind: Baseline | None) -> list[tuple[str, RunConfig]]:
    """Turn a federation into its baseline: as many steps, the same split, no messages that matter.

    Raises:
        ConfigError: such a baseline would be none of the method.
    """
    if kind is None:
        return [("", config)]
    if why := method_options(config.method).no_baseline.get(kind):
        raise ConfigError(
            f'--baseline {kind} would be none of method = "{config.method}": {why}; take the baseline of '
            'another method, such as "lora"'
        )
    document = config.to_document()
    document.update(clients=1, codec={}, server={})
    if kind == "central":
        training = document["training"]
        document["data"]["part"] = [0, 1]  # the partition stays: what is held out depends on it
        document["training"] = {**training, "local_steps": config.training.local_steps * config.answers}
        return [("central", resolve_run(document))]
    runs = []
    for client in range(config.clients):
        document["data"]["part"] = [client, config.clients]
        runs.append((f"client{client}", resolve_run(document)))
    return runs
