"""The researcher's commands that run something. What is heavy is imported late."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.errors import ConfigError, Interrupted
from fedllm.terminal.console import (
    AsJson,
    Device,
    Override,
    Plugin,
    RunDir,
    Source,
    console,
    print_json,
)
from simulations import compress_commands, running
from simulations.experiments import experiment_commands
from simulations.results.options import PANEL
from simulations.results.result_commands import compare

__all__ = ["app"]

app = typer.Typer()
app.add_typer(experiment_commands.app)
app.add_typer(compress_commands.app)
DASHBOARD_PORT = 8080

Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that answer for the clients; default 1, on Ray one per core."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Torch threads of each client, on which a run's last bits depend; default a worker's share.",
    ),
]


@app.command(rich_help_panel=PANEL)
def simulate(
    source: Source = None,
    overrides: Override = None,
    plugin: Plugin = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME.")] = None,
    engine: Annotated[str, typer.Option(help="loopback (in this process) or flower (Ray).")] = "loopback",
    workers: Workers = None,
    threads: Threads = None,
    seeds: Annotated[str | None, typer.Option(help="Repeat over seeds, e.g. 0..4.")] = None,
    baseline: Annotated[str | None, typer.Option(help="local or central: no federation, same split.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write report.html and plots at the end.")] = True,
    track: Annotated[list[str] | None, typer.Option(help="Also log to tensorboard or mlflow.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that lies in --out.")
    ] = False,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Serve the dashboard meanwhile.")] = False,
    dashboard_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Its TCP port; default 8080, or a free one.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run a federation with all its clients on this host."""
    from fedllm.presets import document, origin
    from simulations.experiment import parse_seeds, plan
    from strategies.starting_point import StartingPoint, usual_source

    host = running.Host(engine, workers, threads)
    source = source or usual_source(overrides or [])
    if baseline not in (None, "local", "central"):
        raise ConfigError(f"--baseline is local or central, not {baseline!r}")
    planned = plan(
        document(source, plugin),
        overrides or [],
        out=out,
        seeds=parse_seeds(seeds) if seeds else (),
        baseline=baseline,  # type: ignore[arg-type]  # narrowed just above
        choose=StartingPoint(console.print),
    )
    for run in planned:
        run.config.placed(deployed=False)  # refuses what only a deployment can do
    if dry_run:
        if as_json:
            print_json([run.config.to_document() for run in planned])
        else:
            print("\n".join(run.config.to_toml() for run in planned), end="")
        return
    running.require_packages(host, report=report, compared=len(planned) > 1)
    port = _dashboard_port(dashboard_port) if dashboard or dashboard_port is not None else None
    for run in planned:
        running.free(run.folder, run.config, overwrite)
    running.announce([(origin(source), run.config) for run in planned], planned[0].folder, console)
    with _dashboard(planned[0].folder.parent, port) if port is not None else nullcontext():
        for place, run in enumerate(planned, start=1):
            with _resumable(run.folder, left=len(planned) - place):
                label = run.folder.name if len(planned) > 1 else ""
                running.run(run.config, run.folder, host, console, track=track or [], label=label)
            if report:
                _report(run.folder)
    _conclude([run.folder for run in planned], as_json)


@app.command("plan", rich_help_panel=PANEL)
def plan_ahead(
    source: Source = None,
    overrides: Override = None,
    plugin: Plugin = None,
    model: Annotated[str | None, typer.Option(help="model.name, in short.")] = None,
    task: Annotated[str | None, typer.Option(help="model.task, in short.")] = None,
    memory: Annotated[str | None, typer.Option(help="What a device's process may take, e.g. 1GiB.")] = None,
    uplink: Annotated[
        str | None, typer.Option(help="What a device sends and receives, e.g. 1Mbit/s.", metavar="BITS/s")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="As simulation.profile, e.g. raspberry-pi: its slowest device; default this host."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what each way to train takes on a device, what fits, and which one to take; reads no weights."""
    from fedllm.presets import document
    from simulations import plan_table
    from strategies.registry import resolve_run
    from strategies.starting_point import StartingPoint, usual_source

    short = {"model.name": model, "model.task": task}
    settings = [*(f"{key}={value}" for key, value in short.items() if value), *(overrides or [])]
    start = source or ("own" if model else usual_source(settings))  # other presets name their model's modules
    config = resolve_run(document(start, plugin), settings)
    config = StartingPoint(console.print)(config)
    limits = plan_table.limits(config, memory, uplink, profile)
    plan_table.show(config, limits, as_json)


@app.command(rich_help_panel=PANEL)
def resume(
    run_dir: RunDir,
    rounds: Annotated[
        str | None,
        typer.Option(help="Go on after the end of a finished run: +5 more, or 20 in all.", metavar="+N|N"),
    ] = None,
    engine: Annotated[str, typer.Option(help="loopback or flower.")] = "loopback",
    workers: Workers = None,
    threads: Threads = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a run after a stop, a crash or a kill, or after its end: as if it had never stopped."""
    with _resumable(run_dir):
        went_on = running.go_on(run_dir, running.Host(engine, workers, threads), console, rounds, report=True)
    if went_on:
        _report(run_dir)
    else:
        console.print(f"{run_dir} is finished already.")
    _conclude([run_dir], as_json)


@contextmanager
def _resumable(folder: Path, left: int = 0) -> Iterator[None]:
    """Say how to go on with a run that Ctrl-C ended, and how many of a sweep's runs were not begun."""
    from fedllm.runs.records import FILE

    try:
        yield
    except KeyboardInterrupt:
        begun = (folder / FILE).is_file()
        how = running.how_to_go_on(folder) if begun else "nothing was begun"
        rest = f" ({left} more of these runs not begun)" if left else ""
        raise Interrupted(f"interrupted; {how}{rest}") from None


def _dashboard_port(wanted: int | None) -> int:
    """Return the port for the dashboard: the one wanted, else the usual one, or a free one."""
    from server.dashboard import require_installed
    from server.federation.link import require_free

    require_installed()
    if wanted is not None:
        require_free("127.0.0.1", wanted, "choose another --dashboard-port")
        return wanted
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DASHBOARD_PORT))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _dashboard(runs: Path, port: int) -> Iterator[None]:
    """Serve the dashboard over a folder of runs; it tells its address and first password itself."""
    runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "server.dashboard", str(runs), "--port", str(port)]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _report(folder: Path) -> None:
    from simulations.results.report import write

    console.print(f"report: {write(folder)}")


def _conclude(folders: list[Path], as_json: bool) -> None:
    """Print the summary of one run, or the comparison of several."""
    from fedllm.runs.reader import Run

    if as_json:
        running.require_finished(folders)  # one document on stdout: the answer, or the error
    summaries = [Run(folder).summary for folder in folders]
    if len(folders) > 1:
        compare(folders, as_json=as_json)
    elif as_json:
        print_json(summaries[0])
    else:
        _print_summary(summaries[0], folders[0])
    running.require_finished(folders)


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    from fedllm.runs.reader import Run
    from fedllm.runs.summary import fairness_sentence
    from fedllm.wording import human_bytes, number, saved, times

    told = summary["bytes"]
    metrics = ", ".join(
        f"{name} {value:.4g}" for name, value in summary["metrics"].items() if value is not None
    )
    moved, whole = told["up"] + told["down"], told["reference_total"]
    print(f"{summary['name']}: {summary['status']}; {metrics or 'not evaluated'}")
    if summary.get("ended_early"):
        print(summary["ended_early"])
    run = Run(folder)
    if run.best is not None and run.best.round != run.rounds()[-1].round:
        print(f"best {run.config.metric} {number(run.best.value)} in round {run.best.round}")
    if summary.get("fairness"):
        print(fairness_sentence(summary["fairness"], run.config.metric))
    codec = run.config.codec
    less = {way: saved(told[way], told[f"dense_{way}"], getattr(codec, way)) for way in ("up", "down")}
    ways = [f"{way} {human_bytes(told[way])}{f' ({less[way]})' if less[way] else ''}" for way in less]
    print(f"moved {human_bytes(moved)}: {', '.join(ways)}")
    if moved and whole > 1.05 * moved:
        print(
            f"FedAvg of the whole model moves {human_bytes(whole)} in as many rounds: {times(whole / moved)}"
        )
    print(f"results in {folder}")
