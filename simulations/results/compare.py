"""Several runs side by side: a table, overlaid plots, and what repeats over seeds say about a difference.

Runs whose configurations differ in nothing but seed and name are repeats of one setting; two runs with
the same seed as well are not, they are two rows. The first setting named is the reference of every ratio
and difference.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedllm.errors import StoreError
from fedllm.measures import in_order
from fedllm.runs.reader import Run, find
from fedllm.runs.records import FILE
from fedllm.runs.summary import WARM
from fedllm.wording import human_bytes, human_seconds
from simulations.results import plots
from simulations.results.intervals import Interval, by_seed, counted, interval, paired

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["compare", "draw", "expand", "settings", "table"]


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
        part = run.config.data.part
        data = run.config.data.model_copy(update={"part": part if part == (0, 1) else None})
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

    ``metrics`` are those of all summaries, the one first that decides in the reference. Every row of
    ``settings`` has: ``name``, ``runs`` (folder, seed, status), one interval per metric,
    means of ``bytes_up``, ``bytes_down``, ``seconds``, ``seconds_simulated`` (None unless all runs simulate
    devices), and against the first row: ``bytes_up_ratio`` and ``bytes_ratio`` (reference / this: above 1 is
    fewer), and ``difference`` (paired by seed, per metric).

    Raises:
        StoreError: a folder holds no run.
    """
    runs = [Run(folder) for folder in expand(folders)]
    if not runs:
        return {"reference": None, "metrics": [], "settings": []}
    summaries = {run: run.summary for run in runs}
    names = {name for summary in summaries.values() for name in summary["metrics"]} - {WARM}
    metrics = in_order(names, runs[0].config.metric)
    rows = [
        _row(name, group, [summaries[run] for run in group], metrics)
        for name, group in settings(runs).items()
    ]
    for row in rows:
        _relate(row, rows[0])
    for row in rows:
        del row["by_seed"]
    return {"reference": rows[0]["name"], "metrics": metrics, "settings": rows}


def _row(
    name: str, group: Sequence[Run], summaries: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> dict[str, Any]:
    by_seed = {metric: _by_seed(summaries, metric) for metric in metrics}
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
        "seconds_simulated": _mean_or_none([s["seconds"].get("simulated") for s in summaries]),
        "by_seed": by_seed,
    }


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean where every run has a value."""
    told = [value for value in values if value is not None]
    return fmean(told) if len(told) == len(values) else None


def _by_seed(summaries: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    values = ((summary["seed"], summary["metrics"].get(metric)) for summary in summaries)
    return by_seed((seed, value) for seed, value in values if value is not None)


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
    return None if value is None else value.to_json()


def table(comparison: Mapping[str, Any]) -> Table:
    """Lay a comparison out for a terminal of 80 columns; metrics that no run has are left out."""
    from rich.table import Table

    rows = comparison["settings"]
    measured = [metric for metric in comparison["metrics"] if any(row[metric] for row in rows)]
    main = measured[:1]
    # A terminal of 80 columns has no room for more; each run's summary and report show all.
    metrics = main + [metric for metric in measured[1:] if metric == "loss"]
    seeds = any(len(row["runs"]) > 1 for row in rows)
    caption = f"ratios and change against {comparison['reference']}"
    caption += "; mean and half of its 95 % interval over seeds, none below 3 seeds" if seeds else ""
    laid = Table(caption=caption, box=None, padding=(0, 1, 0, 0), header_style="bold")
    laid.add_column("run", overflow="fold", min_width=12)
    for title in (*metrics, *(f"{metric}\nchange" for metric in main)):
        laid.add_column(title, justify="right", no_wrap=True)
    # Time on the devices, where all rows have it: the host's own says little beside it.
    simulated = all(row["seconds_simulated"] is not None for row in rows)
    time = "simulated\ntime" if simulated else "time"
    for title in ("up", "fewer\nup", "down", "fewer\nin all", time):
        laid.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        laid.add_row(
            row["name"] + _unfinished(row["runs"]) + (f"\n{_counted(row['runs'])}" if seeds else ""),
            *(_cell(row[metric]) for metric in metrics),
            *(_cell(row["difference"][metric], "+.4f") for metric in main),
            human_bytes(row["bytes_up"]),
            _times(row["bytes_up_ratio"]),
            human_bytes(row["bytes_down"]),
            _times(row["bytes_ratio"]),
            human_seconds(row["seconds_simulated" if simulated else "seconds"]),
        )
    return laid


def _counted(runs: Sequence[Mapping[str, Any]]) -> str:
    return counted([run["seed"] for run in runs])


def _unfinished(runs: Sequence[Mapping[str, Any]]) -> str:
    statuses = sorted({run["status"] for run in runs} - {"finished"})
    return f" ({', '.join(statuses)})" if statuses else ""


def _cell(value: Mapping[str, Any] | None, form: str = ".4f") -> str:
    if value is None:
        return "-"
    mean = format(value["mean"], form)
    if value["n"] < 2:
        return mean
    half = f"±{(value['high'] - value['low']) / 2:.4f}" if value["means_something"] else f"n = {value['n']}"
    return f"{mean}\n{half}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}x" if ratio >= 0.1 else f"{ratio:.1g}x"


def draw(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write overlaid plots of one metric that all runs have, against rounds, bytes and seconds.

    It is the one that decides in the first run, if all have it.

    Returns:
        The PNGs' paths; empty where the runs have no metric in common.

    Raises:
        StoreError: a folder holds no run, or ``out`` cannot be written.
    """
    runs = [Run(folder) for folder in expand(folders)]
    groups = settings(runs)
    rounds = {name: [(run.config.seed, run.rounds()) for run in group] for name, group in groups.items()}
    every = [records for group in rounds.values() for _, records in group]
    measured = [{name for record in records for name in record.metrics} for records in every]
    common = in_order(set.intersection(*measured), runs[0].config.metric) if measured else []
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for metric in common[:1]:
        for against in plots.axes_of(every):
            if any(len(group) > 1 for group in rounds.values()):
                figure = plots.repeated(rounds, metric, against)
            else:
                figure = plots.curves({name: group[0][1] for name, group in rounds.items()}, metric, against)
            paths.append(plots.save(figure, out / f"{metric}-{against}.png"))
    return paths
