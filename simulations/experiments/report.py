"""``report.md`` and ``report.html``, figures and ``cells.csv``: what a reader of an experiment gets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.runs.durable import disk_errors, replace_file, to_json
from fedllm.runs.provenance.identity import provenance
from fedllm.runs.reader import Run
from simulations.experiments import figures, spectra
from simulations.experiments.cells import CellRun
from simulations.experiments.definition import Experiment
from simulations.experiments.findings import moved, said, shown, title, value
from simulations.results import plots
from simulations.results.report import environment

__all__ = ["markdown", "tables", "write"]

_OF_KIND = {"difference": "", "times_fewer": ", times fewer", "share_of_gain": ", share of the gain"}


@dataclass(frozen=True)
class _Part:
    """A heading, what is said below it, a table and figures; ``words`` are columns of words, not numbers."""

    heading: str = ""
    texts: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    words: Sequence[int] = (0,)
    figures: Sequence[tuple[str, str, Any]] = ()


def write(
    experiment: Experiment,
    found: Mapping[str, Any],
    runs: Sequence[CellRun],
    out: Path,
    command: Callable[[str], str],
) -> Path:
    """Write everything into the experiment's folder.

    Args:
        experiment: what was asked.
        found: see :func:`simulations.experiments.findings.findings`.
        runs: all of it, finished or not.
        out: the folder.
        command: the words that make the run of a label.

    Returns:
        ``report.html``.

    Raises:
        StoreError: the folder cannot be written.
    """
    from markupsafe import Markup

    machine = [run for run in runs if run.status == "finished"]
    drawn = figures.figures(found)
    drawn |= figures.courses(_courses(experiment, machine), found["metric"])
    drawn |= spectra.figures({run.label: run.folder for run in machine if run.cell in experiment.spectra})
    with disk_errors(out):
        (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in drawn.items():
        plots.save(figure, out / "figures" / f"{name}.png")
    made = provenance(made_by=_made_by([Run(run.folder).provenance for run in machine]))
    replace_file(out / "environment.json", to_json(made, indent=2))
    replace_file(out / "cells.csv", _csv(experiment, found, runs, command))
    parts = [*tables(experiment, found), _origin(made, len(machine), command("LABEL"))]
    replace_file(out / "report.md", f"# {experiment.title}\n\n{markdown(_with(parts, drawn))}")
    told = {name: (caption, Markup(plots.svg(figure, name))) for name, (caption, figure) in drawn.items()}
    page = (
        environment().get_template("experiment.html").render(title=experiment.title, parts=_with(parts, told))
    )
    replace_file(out / "report.html", page)
    return out / "report.html"


def _courses(experiment: Experiment, runs: Sequence[CellRun]) -> dict[str, figures.Runs]:
    """Return seed and rounds of the finished runs of each cell with a federation, by its title."""
    found: dict[str, figures.Runs] = {}
    for run in runs:
        cell = experiment.cells[run.cell]
        if cell.baseline is None:
            found.setdefault(cell.title, []).append((run.config.seed, Run(run.folder).rounds()))
    return found


def _with(parts: Sequence[_Part], drawn: Mapping[str, tuple[str, Any]]) -> list[_Part]:
    """Put the figures behind the tables."""
    shown = [(name, caption, figure) for name, (caption, figure) in drawn.items()]
    return [*parts[:-1], _Part("Figures", figures=shown), parts[-1]] if shown else list(parts)


def markdown(parts: Sequence[_Part]) -> str:
    """Write parts of a report as Markdown."""
    return "\n".join(line for part in parts for line in _lines(part))


def _lines(part: _Part) -> list[str]:
    lines = [f"## {part.heading}", ""] if part.heading else []
    for text in part.texts:
        lines += [text, ""]
    if part.rows:
        lines += [_row(part.head), _row(["---"] * len(part.head)), *map(_row, part.rows), ""]
    for name, caption, _ in part.figures:
        lines += [
            f"![{caption}](figures/{name}.png)",
            "",
            f"{caption}; also [as SVG](figures/{name}.svg).",
            "",
        ]
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(experiment: Experiment, found: Mapping[str, Any]) -> list[_Part]:
    """Return what an experiment found as tables: cells, differences, claims and what failed."""
    titles = {name: cell.title for name, cell in experiment.cells.items()}
    parts = [
        _Part(texts=(f"The paper: {experiment.paper}", f"Here: {experiment.here}")),
        _Part(
            "Cells",
            ("Mean ± standard deviation over seeds, after the last round.",),
            ("cell", "called", "runs", *(title(name) for name in found["columns"])),
            [_cell(cell, found["columns"]) for cell in found["cells"]],
            (0, 1),
        ),
    ]
    if found["differences"]:
        rows = [_compared(one, titles) for one in found["differences"]]
        why = (
            "Paired by seed: split and initial values are the same on both sides; no interval below 3 seeds."
        )
        names = ("compared", "what", "seeds", "mean [95 % interval]", "shows")
        parts.append(_Part("Differences", (why,), names, rows, (0, 1, 4)))
    if found["claims"]:
        judged = [
            (one["paper"], *_compared(one, titles)[:4], _wanted(one), one["verdict"])
            for one in found["claims"]
        ]
        head = ("the paper", "here", "what", "seeds", "ours", "wanted", "verdict")
        parts.append(_Part("Claims", ("A claim is met where our mean is.",), head, judged, (0, 1, 2, 6)))
    if found["failed"]:
        parts.append(_Part("What failed", (), ("run", "why"), list(found["failed"].items()), (0, 1)))
    return parts


def _cell(cell: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    many = f"{cell['finished']} of {cell['runs']}" if cell["finished"] < cell["runs"] else str(cell["runs"])
    return [cell["title"], cell["name"], many, *(_spread(name, cell["measured"][name]) for name in columns)]


def _spread(name: str, told: Mapping[str, Any] | None) -> str:
    if told is None:
        return "-"
    mean = said(name, told["mean"])
    return mean if told["deviation"] is None else f"{mean} ± {said(name, told['deviation'])}"


def _compared(one: Mapping[str, Any], titles: Mapping[str, str]) -> tuple[str, str, str, str, str]:
    sign = "minus" if one["kind"] == "difference" else "beside"
    what = title(one["measure"]) + _OF_KIND[one["kind"]]
    seeds = str(one["found"]["n"]) if one["found"] else "-"
    return f"{titles[one['of']]} {sign} {titles[one['against']]}", what, seeds, shown(one), one["shows"]


def _wanted(one: Mapping[str, Any]) -> str:
    least = one["at_least"]
    return "-" if least is None else f"at least {least:g}" + ("x" if one["kind"] == "times_fewer" else "")


def _made_by(told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the versions and commits that made the runs, each once: a repeated command keeps older runs."""
    made = {json.dumps({key: one.get(key) for key in ("versions", "git")}, sort_keys=True) for one in told}
    return [json.loads(text) for text in sorted(made)]


def _origin(made: Mapping[str, Any], runs: int, command: str) -> _Part:
    rows = [
        ("runs", f"{name} {version}")
        for one in made["made_by"]
        for name, version in (one["versions"] or {}).items()
    ]
    for one in made["made_by"]:
        git = one["git"]
        changed = ", with changes that are not committed" if git and git["modified"] else ""
        rows.append(("runs", f"commit {git['commit']}{changed}" if git else "no git checkout"))
    rows += [("this page's host", f"{name} {text}") for name, text in made["machine"].items()]
    several = "; they were made by several versions" if len(made["made_by"]) > 1 else ""
    texts = (
        f"cells.csv names the folder of each of the {runs} finished runs, and the command for it{several}.",
        f"With a LABEL of that file: {command}",
    )
    return _Part("Where the numbers come from", texts, ("of", "what"), list(dict.fromkeys(rows)), (0, 1))


def _csv(
    experiment: Experiment,
    found: Mapping[str, Any],
    runs: Sequence[CellRun],
    command: Callable[[str], str],
) -> str:
    measures = [*found["columns"]]
    measures += [one["measure"] for part in ("differences", "claims") for one in found[part]]
    measures = list(dict.fromkeys(measures))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["label", "cell", "seed", "status", *measures, "folder", "command", "reason"])
    for run in runs:
        stored = Run(run.folder) if run.status == "finished" else None
        alone = experiment.cells[run.cell].baseline is not None
        told = ["" if stored is None or (alone and moved(name)) else value(stored, name) for name in measures]
        reason = found["failed"].get(run.label, "")
        row = [run.label, run.cell, run.config.seed, run.status, *told]
        rows.writerow([*row, run.folder, command(run.label), reason])
    return text.getvalue()
