"""The command that runs a paper's comparison."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedllm.errors import ConfigError, Interrupted, RunFailed
from fedllm.terminal.console import AsJson, Device, Override, console, print_json, results
from simulations.results.options import PANEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulations.experiments.cells import CellRun
    from simulations.experiments.definition import Experiment

__all__ = ["app"]

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def reproduce(
    experiment: Annotated[
        str | None, typer.Argument(help="fedkd, fwdllm, lora, or a TOML file; without one they are listed.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Cells to run, by name or label; * stands for anything.", metavar="PATTERN"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and seeds: minutes.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="List the runs with what they cost, and stop.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs side by side, a process each; default one per core, or one at --scale paper."
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Torch threads of each, on which a run's last bits depend.")
    ] = 1,
    scale: Annotated[
        str, typer.Option(help="cpu: bundled model and texts. paper: the papers' own, for an accelerator.")
    ] = "cpu",
    seeds: Annotated[str | None, typer.Option(help="Instead of the file's seeds, e.g. 0..4.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/reproduce-NAME.")] = None,
    overrides: Override = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Repeat a paper's comparison on a small model, over seeds; it goes on where it was interrupted."""
    from fedllm.extras import require
    from simulations.costs import sentences
    from simulations.experiment import parse_seeds
    from simulations.experiments import cells
    from simulations.experiments.definition import read
    from simulations.experiments.findings import findings
    from simulations.experiments.paper_scale import reckoned
    from simulations.experiments.report import markdown, tables, write
    from simulations.experiments.runner import run_all

    if experiment is None:
        if only or quick or seeds or out or overrides or scale != "cpu":
            raise ConfigError("which experiment? fedllm reproduce lists those there are")
        _overview(as_json)
        return
    asked = read(experiment, _scale(scale))
    if quick and asked.quick is None:
        raise ConfigError("this experiment has no [quick]: leave --quick out")
    variant = asked.quick if quick else None
    at = "" if scale == "cpu" else f"-{scale}"
    folder = out or Path("runs") / f"reproduce-{Path(experiment).stem}{at}{'-quick' if quick else ''}"
    chosen = parse_seeds(seeds) if seeds else ()
    reckon = reckoned(asked) if asked.hardware else None
    everything = cells.lay_out(
        asked, folder, variant=variant, seeds=chosen, extra=overrides or [], reckon=reckon
    )
    runs = cells.selected(everything, only or [])
    if asked.hardware and not as_json:
        _needed(asked, runs)
    if listed:
        _list(asked, runs, as_json)
        return
    require("matplotlib", "the report of an experiment")
    require("scipy", "the comparison of several runs")
    left = cells.unfinished(runs, console.print)
    usual = 1 if asked.hardware else os.cpu_count() or 1
    workers = min(jobs or usual, max(1, len(left)))
    if left and asked.hardware is None:
        for sentence in sentences(cells.forecast(left, workers), folder, workers):
            console.print(sentence)
    try:
        failed = run_all(left, workers, threads, console.print)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on where it was") from None
    changed = (
        "the quick variant has fewer rounds" if quick else "--set changed the cells" if overrides else ""
    )
    found = findings(asked, everything, failed, changed)

    def command(label: str) -> str:
        words = ["fedllm", "reproduce", experiment, "--only", label, *(["--quick"] if quick else [])]
        words += [] if scale == "cpu" else ["--scale", scale]
        words += [] if seeds is None else ["--seeds", seeds]
        words += [word for one in overrides or [] for word in ("--set", one)]
        words += [] if threads == 1 else ["--threads", str(threads)]
        return shlex.join([*words, *([] if out is None else ["--out", str(out)])])

    page = write(asked, found, everything, folder, command)
    if as_json and not failed:
        print_json({"out": str(folder), **found})
    elif not as_json:
        print(markdown(tables(asked, found)))
        console.print(f"report: {page}")
    if failed:
        label, reason = next(iter(failed.items()))
        raise RunFailed(
            f"{len(failed)} of {len(runs)} runs failed, {label} first: {reason}; the same command tries again"
        )


def _scale(text: str) -> Literal["cpu", "paper"]:
    match text:
        case "cpu" | "paper":
            return text
    raise ConfigError(f"--scale is cpu or paper, not {text!r}")


def _needed(experiment: Experiment, runs: Sequence[CellRun]) -> None:
    """Print what a run of each cell needs on the experiment's hardware."""
    from rich.table import Table

    from fedllm.wording import human_bytes, human_seconds
    from simulations.experiments.paper_scale import needs

    hardware = experiment.hardware
    assert hardware is not None  # who calls this saw to that
    need = needs(experiment)
    table = Table("cell", "model", "accelerator memory", "computing", "would move")
    for cell, run in {run.cell: run for run in runs}.items():
        one = need(run.config)
        over = "" if one.memory <= 1e9 * hardware.memory_gb else " (too much)"
        memory, time = human_bytes(one.memory) + over, human_seconds(round(one.seconds))
        table.add_row(cell, run.config.model.name, memory, time, human_bytes(one.moved))
    results.print(table)
    rate = f"{hardware.tflops:g} Tflop/s at {100 * hardware.efficiency:g} %, {hardware.memory_gb:g} GB"
    console.print(f"one run of each, without evaluation, reckoned for a {hardware.name}: {rate}")


def _overview(as_json: bool) -> None:
    """Print the experiments that come with the package, with what each takes on one core."""
    from rich.table import Table

    from fedllm.wording import human_seconds
    from simulations.experiments import cells
    from simulations.experiments.definition import names, read

    table = Table("experiment", "what", "runs", "about, one core")
    rows: list[dict[str, object]] = []
    for name in names():
        asked = read(name)
        runs = cells.lay_out(asked, Path("runs") / f"reproduce-{name}")
        seconds = sum(run.cost.seconds for run in runs)
        rows.append({"name": name, "title": asked.title, "runs": len(runs), "seconds": seconds})
        table.add_row(name, asked.title, str(len(runs)), human_seconds(round(seconds)))
    if as_json:
        print_json(rows)
        return
    results.print(table)
    console.print("fedllm reproduce NAME runs one, --list names its runs")


def _list(experiment: Experiment, runs: Sequence[CellRun], as_json: bool) -> None:
    """Print the runs with what each takes on one core."""
    from rich.table import Table

    from fedllm.wording import human_bytes, human_seconds

    if as_json:
        rows = [
            {"label": run.label, "cell": run.cell, "status": run.status, "folder": str(run.folder)}
            | {"seconds": run.cost.seconds, "memory": run.cost.memory, "disk": run.cost.disk}
            for run in runs
        ]
        print_json(rows)
        return
    table = Table("run", "what", "about", "memory", "disk", "status")
    for run in runs:
        told = experiment.cells[run.cell].title
        about, memory = human_seconds(round(run.cost.seconds)), human_bytes(run.cost.memory)
        table.add_row(run.label, told, about, memory, human_bytes(run.cost.disk), run.status)
    results.print(table)
    console.print(
        f"{len(runs)} runs, about {human_seconds(round(sum(r.cost.seconds for r in runs)))} of one "
        + (experiment.hardware.name if experiment.hardware else "core")
    )
