"""Several runs side by side: a table, overlaid plots, and what repeats over seeds say about a difference.

Runs whose configurations differ in nothing but seed and name are repeats of one setting; two runs with
the same seed as well are not, they are two rows. The first setting named is the reference of every ratio
and difference.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fedllm.errors import StoreError
from fedllm.run_database import FILE
from fedllm.runs import Run, find
from fedllm.wording import human_bytes, human_seconds
from simulations import plots

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Interval", "compare", "draw", "expand", "interval", "paired", "settings", "table"]

_METRICS = ("accuracy", "loss", "perplexity")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval; a single seed has a mean only."""

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's t interval of the mean (n - 1 degrees of freedom).

    >>> found = interval([1.0, 2.0, 3.0])  # 2 +- 4.3027 / sqrt(3)
    >>> round(found.low, 4), found.mean, round(found.high, 4)
    (-0.4841, 2.0, 4.4841)
    >>> interval([0.5])
    Interval(mean=0.5, low=None, high=None, n=1)
    """
    count, mean = len(values), fmean(values)
    if count < 2:
        return Interval(mean, None, None, count)
    from scipy.stats import t

    half = float(t.ppf(0.5 + confidence / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(reference: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """Return the interval of ``other - reference`` over the seeds that both have, or None without any.

    Pairing by seed takes out what the split and the initial values do to both alike.

    >>> paired({0: 0.90, 1: 0.94}, {0: 0.91, 1: 0.95, 2: 0.5}).n
    2
    """
    seeds = sorted(reference.keys() & other.keys())
    return interval([other[seed] - reference[seed] for seed in seeds]) if seeds else None


def expand(paths: Sequence[Path]) -> list[Path]:
    """Replace folders of runs by the runs in them.

    Raises:
        StoreError: a path is neither a run nor a folder of runs.
    """
    folders: list[Path] = []
    for path in paths:
        inside = [path] if (path / FILE).is_file() else find(path)
        if not inside:
            raise StoreError(f"{path} holds no run: {FILE} is missing")
        folders += inside
    return folders


def settings(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ in nothing but seed, name and, without a federation, the client that trains.

    Keys are short names for people.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    times_seen: Counter[tuple[Any, ...]] = Counter()
    for run in runs:
        data = run.config.data.model_copy(update={"part": None})
        setting = run.config.model_copy(update={"seed": 0, "name": "", "data": data}).to_json()
        same = (setting, run.config.seed, run.config.data.part)
        groups.setdefault((setting, times_seen[same]), []).append(run)
        times_seen[same] += 1
    named: dict[str, list[Run]] = {}
    for group in groups.values():
        name = _name(group)
        # Different settings may carry one name, and then only the folder tells them apart.
        named[name if name not in named else f"{name} ({group[0].folder})"] = group
    return named


def _name(group: Sequence[Run]) -> str:
    folders = [run.folder.name for run in group]
    if len(group) == 1:
        return folders[0]
    names = [run.config.name for run in group]
    return names[0] if len(set(names)) == 1 else _common_start(folders) or folders[0]


def _common_start(names: Sequence[str]) -> str:
    """Return what all names begin with: ``lora-seed`` of ``lora-seed0`` and ``lora-seed1``."""
    shared = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in shared).rstrip("-_.")


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the comparison as JSON.

    Every row of ``settings`` has: ``name``, ``runs`` (folder, seed, status), one interval per metric,
    means of ``bytes_up``, ``bytes_down``, ``seconds``, and against the first row: ``bytes_up_ratio`` and
    ``bytes_ratio`` (reference / this: above 1 is fewer), and ``difference`` (paired by seed, per metric).

    Raises:
        StoreError: a folder holds no run.
    """
    groups = settings([Run(folder) for folder in expand(folders)])
    rows = [_row(name, group) for name, group in groups.items()]
    for row in rows:
        _relate(row, rows[0])
    for row in rows:
        del row["by_seed"]
    return {"reference": rows[0]["name"], "settings": rows} if rows else {"reference": None, "settings": []}


def _row(name: str, group: Sequence[Run]) -> dict[str, Any]:
    summaries = [run.summary for run in group]
    by_seed = {metric: _by_seed(summaries, metric) for metric in _METRICS}
    return {
        "name": name,
        "runs": [
            {"folder": str(run.folder), "seed": s["seed"], "status": run.status}
            for run, s in zip(group, summaries, strict=True)
        ],
        **{metric: _json(interval(list(v.values())) if v else None) for metric, v in by_seed.items()},
        "bytes_up": fmean(s["bytes"]["up"] for s in summaries),
        "bytes_down": fmean(s["bytes"]["down"] for s in summaries),
        "seconds": fmean(s["seconds"]["total"] for s in summaries),
        "by_seed": by_seed,
    }


def _by_seed(summaries: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Return a metric by seed: its mean where every client trained for itself."""
    values: dict[int, list[float]] = {}
    for summary in summaries:
        if summary["metrics"][metric] is not None:
            values.setdefault(summary["seed"], []).append(summary["metrics"][metric])
    return {seed: fmean(own) for seed, own in values.items()}


def _relate(row: dict[str, Any], reference: Mapping[str, Any]) -> None:
    row["bytes_up_ratio"] = _ratio(reference["bytes_up"], row["bytes_up"])
    row["bytes_ratio"] = _ratio(
        reference["bytes_up"] + reference["bytes_down"], row["bytes_up"] + row["bytes_down"]
    )
    row["difference"] = {
        metric: _json(None if row is reference else paired(reference["by_seed"][metric], values))
        for metric, values in row["by_seed"].items()
    }


def _ratio(reference: float, other: float) -> float | None:
    return reference / other if other else None


def _json(value: Interval | None) -> dict[str, Any] | None:
    return None if value is None else {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}


def table(comparison: Mapping[str, Any]) -> Table:
    """Lay a comparison out for a terminal of 80 columns; metrics that no run has are left out."""
    from rich.table import Table

    rows = comparison["settings"]
    metrics = [metric for metric in _METRICS if any(row[metric] for row in rows)]
    main = metrics[:1]
    seeds = any(len(row["runs"]) > 1 for row in rows)
    caption = f"ratios and change against {comparison['reference']}"
    caption += "; mean and half of its 95 % interval over seeds" if seeds else ""
    laid = Table(caption=caption, box=None, padding=(0, 1, 0, 0), header_style="bold")
    laid.add_column("run", overflow="fold", min_width=12)
    for title in (*metrics, *(f"{metric}\nchange" for metric in main)):
        laid.add_column(title, justify="right", no_wrap=True)
    for title in ("up", "fewer\nup", "down", "fewer\nin all", "time"):
        laid.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        laid.add_row(
            row["name"] + _unfinished(row["runs"]) + (f"\n{_seeds(row['runs'])}" if seeds else ""),
            *(_cell(row[metric]) for metric in metrics),
            *(_cell(row["difference"][metric], "+.4f") for metric in main),
            human_bytes(row["bytes_up"]),
            _times(row["bytes_up_ratio"]),
            human_bytes(row["bytes_down"]),
            _times(row["bytes_ratio"]),
            human_seconds(row["seconds"]),
        )
    return laid


def _seeds(runs: Sequence[Any]) -> str:
    return f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"


def _unfinished(runs: Sequence[Mapping[str, Any]]) -> str:
    statuses = sorted({run["status"] for run in runs} - {"finished"})
    return f" ({', '.join(statuses)})" if statuses else ""


def _cell(value: Mapping[str, Any] | None, form: str = ".4f") -> str:
    if value is None:
        return "-"
    mean = format(value["mean"], form)
    return mean if value["low"] is None else f"{mean}\n±{(value['high'] - value['low']) / 2:.4f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}x" if ratio >= 0.1 else f"{ratio:.1g}x"


def draw(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write overlaid plots of the first metric that all runs have, against rounds, bytes and seconds.

    Returns:
        The PNGs' paths; empty where the runs have no metric in common.

    Raises:
        StoreError: a folder holds no run, or ``out`` cannot be written.
    """
    groups = settings([Run(folder) for folder in expand(folders)])
    rounds = {name: [run.rounds() for run in group] for name, group in groups.items()}
    every = [records for group in rounds.values() for records in group]
    common = [m for m in _METRICS if all(any(m in record.metrics for record in records) for records in every)]
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for metric in common[:1]:
        for against in plots.AXES:
            if any(len(group) > 1 for group in rounds.values()):
                figure = plots.repeated(rounds, metric, against)
            else:
                figure = plots.curves({name: group[0] for name, group in rounds.items()}, metric, against)
            paths.append(plots.save(figure, out / f"{metric}-{against}.png"))
    return paths
