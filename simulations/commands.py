"""The researcher's commands: run, continue, compare, report, ask. Imports what is heavy only on use."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedllm.errors import ConfigError, RunFailed
from fedllm.terminal import AsJson, Override, RunDir, Source, console

if TYPE_CHECKING:
    from fedllm.config import RunConfig

__all__ = ["app"]

app = typer.Typer()
PANEL = "Simulations and results"

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
    source: Source = "quickstart",
    overrides: Override = None,
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
    as_json: AsJson = False,
) -> None:
    """Run a federation with all its clients on this host."""
    from fedllm import run_folder
    from fedllm.run_database import FILE
    from simulations.catalogue import document
    from simulations.experiment import parse_seeds, plan

    if engine not in ("loopback", "flower"):
        raise ConfigError(f"--engine is loopback or flower, not {engine!r}")
    if baseline not in (None, "local", "central"):
        raise ConfigError(f"--baseline is local or central, not {baseline!r}")
    planned = plan(
        document(source),
        overrides or [],
        out=out,
        seeds=parse_seeds(seeds) if seeds else (),
        baseline=baseline,  # type: ignore[arg-type]  # narrowed just above
    )
    if dry_run:
        for run in planned:
            print(run.config.to_toml(), end="")
        return
    for run in planned:
        if (run.folder / FILE).is_file():
            run_folder.require_free(run.folder, overwrite)
            run_folder.clear(run.folder)
    with _dashboard(planned[0].folder.parent) if dashboard else nullcontext():
        for run in planned:
            _simulate(run.config, run.folder, engine, workers, threads, track or [])
            if report:
                _report(run.folder)
    _conclude([run.folder for run in planned], as_json)


@app.command(rich_help_panel=PANEL)
def resume(
    run_dir: RunDir,
    engine: Annotated[str, typer.Option(help="loopback or flower.")] = "loopback",
    workers: Workers = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue a run after a stop, a crash or a kill: the numbers come out as if it had never stopped."""
    from fedllm.runs import Run

    stored = Run(run_dir)
    federation = run_dir.resolve().parent.parent
    if (federation / "federation.toml").is_file():
        raise ConfigError(
            f"{run_dir} is a federation's run; go on with: fedllm run --resume {run_dir.resolve().name} "
            f"--server {federation}"
        )
    if stored.status != "finished":
        _simulate(stored.config, run_dir, engine, workers, threads)
        _report(run_dir)
    else:
        console.print(f"{run_dir} is finished already.")
    _conclude([run_dir], as_json)


def _simulate(
    config: RunConfig,
    folder: Path,
    engine: str,
    workers: int | None,
    threads: int | None,
    track: Sequence[str] = (),
) -> None:
    import torch

    from fedllm import trackers
    from fedllm.live import watching
    from simulations import flower, loopback

    logging.getLogger("flwr").setLevel(logging.WARNING)
    _say_what_is_logged()
    with trackers.opened(track, folder, config) as opened, watching(folder, console, opened):
        cores = torch.get_num_threads()
        if engine == "flower":
            flower.simulate(config, folder, workers or cores, threads or 1)
        else:
            workers = workers or 1
            loopback.simulate(config, folder, workers, threads or max(1, cores // workers))


def _say_what_is_logged() -> None:
    """Show what the library has to say about a run, such as what it can hope for, between the rounds."""

    class Say(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(record.getMessage(), highlight=False, markup=False)

    for name in ("fedllm", "strategies"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [Say()]


@contextmanager
def _dashboard(runs: Path) -> Iterator[None]:
    """Serve the dashboard over a folder of runs; it tells its address and first password itself."""
    runs.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "server.dashboard", str(runs)], stdout=sys.stderr)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _report(folder: Path) -> None:
    from simulations.report import write

    console.print(f"report: {write(folder)}", highlight=False)


def _conclude(folders: list[Path], as_json: bool) -> None:
    """Print the summary of one run, or the comparison of several."""
    from fedllm.runs import Run

    summaries = [Run(folder).summary for folder in folders]
    if len(folders) > 1:
        compare(folders, as_json=as_json)
    elif as_json:
        print(json.dumps(summaries[0], indent=2))
    else:
        _print_summary(summaries[0], folders[0])
    _require_finished(folders)


def _require_finished(folders: Sequence[Path]) -> None:
    """A run that was stopped is not a success."""
    from fedllm.runs import Run

    if any(Run(folder).status != "finished" for folder in folders):
        raise RunFailed(f"stopped before the last round; continue with fedllm resume {folders[-1]}")


def _print_summary(summary: dict[str, Any], folder: Path) -> None:
    from fedllm.wording import human_bytes

    told = summary["bytes"]
    metrics = ", ".join(
        f"{name} {value:.4g}" for name, value in summary["metrics"].items() if value is not None
    )
    moved = told["up"] + told["down"]
    print(f"{summary['name']}: {summary['status']}; {metrics or 'not evaluated'}")
    print(
        f"moved {human_bytes(moved)} (up {human_bytes(told['up'])}, down {human_bytes(told['down'])})"
        + (f", {told['reference_total'] / moved:.1f}x less than the whole model" if moved else "")
    )
    print(f"results in {folder}")


@app.command(rich_help_panel=PANEL)
def presets(as_json: AsJson = False) -> None:
    """List the presets and what each costs."""
    from rich.table import Table

    from simulations.catalogue import presets as load

    found = load()
    if as_json:
        print(json.dumps([{"name": p.name, "shows": p.shows, "costs": p.costs} for p in found], indent=2))
        return
    table = Table("preset", "shows", "costs")
    for preset in found:
        table.add_row(preset.name, preset.shows, preset.costs)
    Console().print(table)


@app.command(rich_help_panel=PANEL)
def codecs(as_json: AsJson = False) -> None:
    """List the codec stages with their bits, properties and cost."""
    from rich.table import Table

    from fedllm.codecs.catalogue import catalogue

    rows = [dataclasses.asdict(entry) for entry in catalogue()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("stage", "bits per value", "properties of the example", "what it does")
    for row in rows:
        properties = [name for name in ("linear", "unbiased", "contractive", "stateful") if row[name]]
        table.add_row(row["name"], row["bits"], ", ".join(properties), f"{row['summary']}\n{row['example']}")
    Console().print(table)


@app.command(rich_help_panel=PANEL)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of runs.")],
    plots: Annotated[Path | None, typer.Option(help="Also write overlaid plots into this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set runs side by side: quality, bytes and time; repeats over seeds as mean and interval."""
    from simulations import compare as comparison

    found = comparison.compare(runs)
    if plots is not None:
        for path in comparison.draw(runs, plots):
            console.print(path, highlight=False)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console().print(comparison.table(found))


@app.command(rich_help_panel=PANEL)
def report(run_dir: RunDir) -> None:
    """Write a run's self-contained report.html and its plots."""
    from simulations.report import write

    print(write(run_dir))


@app.command(rich_help_panel=PANEL)
def predict(
    run_dir: RunDir, texts: Annotated[list[str], typer.Argument(help="Texts.")], as_json: AsJson = False
) -> None:
    """Classify texts with a run's model, or continue them with a causal one."""
    from simulations.predict import predict as answer

    answers = answer(run_dir, texts)
    if as_json:
        print(json.dumps(answers, indent=2))
        return
    for one in answers:
        if "continuation" in one:
            print(f"{one['text']}{one['continuation']}")
        else:
            print(f"{one['label']}\t{one['probabilities'][one['label']]:.3f}\t{one['text']}")


@app.command(rich_help_panel=PANEL)
def export(run_dir: RunDir, out: Annotated[Path, typer.Argument(help="New folder to write to.")]) -> None:
    """Write a run's result for other programs: the adapter in peft's format, or a transformers model."""
    from simulations.predict import restore

    if out.exists():
        raise ConfigError(f"{out} exists already; choose a folder that does not")
    model, method = restore(run_dir)
    method.save(model, model.read(), out)
    print(out)


@app.command(rich_help_panel=PANEL)
def reproduce(
    experiment: Annotated[str, typer.Argument(help="fedkd, fwdllm or lora.")],
    scale: Annotated[str, typer.Option(help="cpu (bundled model and texts) or paper (GPU, hub).")] = "cpu",
    seeds: Annotated[str, typer.Option(help="Seeds of every preset.")] = "0..4",
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/reproduce-NAME.")] = None,
    overrides: Override = None,
    workers: Workers = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Run a paper's experiment and its references over seeds; it goes on where it was interrupted."""
    from fedllm.runs import Run
    from simulations import compare as comparison
    from simulations import distilled
    from simulations.experiment import parse_seeds
    from simulations.reproduce import lay_out, unfinished

    if scale not in ("cpu", "paper"):
        raise ConfigError(f"--scale is cpu or paper, not {scale!r}")
    folder = out or Path("runs") / f"reproduce-{experiment}"
    planned = lay_out(experiment, parse_seeds(seeds), scale, folder, overrides or [])  # type: ignore[arg-type]
    for run in unfinished(planned, lambda said: console.print(said, highlight=False)):
        _simulate(run.config, run.folder, "loopback", workers, threads)
    folders = [run.folder for run in planned]
    found = comparison.compare(folders)
    if experiment == "fedkd":
        found |= distilled.notes([Run(folder) for folder in folders])
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console().print(comparison.table(found))
        if experiment == "fedkd":
            print(distilled.sentences(found))
    _require_finished(folders)


@app.command(rich_help_panel=PANEL)
def bench(
    what: Annotated[
        str, typer.Argument(help="aggregation, codecs, deployment, distill, memory or simulation.")
    ],
    fuzz: Annotated[int, typer.Option(help="codecs: also decode this many mutated payloads.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="codecs: draw error against bits a value as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what the documentation states, side by side with what it is compared to."""
    import pkgutil
    from importlib import import_module

    from simulations import bench as benchmarks

    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg)
    if what not in names:
        raise ConfigError(f"there is no benchmark {what!r}; benchmarks are {', '.join(names)}")
    if what != "codecs" and (fuzz or plot):
        raise ConfigError(f"--fuzz and --plot belong to fedllm bench codecs, not to {what}")
    options = {"fuzz": fuzz} if what == "codecs" else {}
    benchmark = import_module(f"simulations.bench.{what}")
    found = benchmark.run(**options)
    if plot is not None:
        benchmark.draw(found, plot)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_nested(found)


def _print_nested(found: Any, indent: str = "") -> None:
    """Print nested results as indented lines, numbers short."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if isinstance(value, dict | list):
            print(f"{indent}{key}")
            _print_nested(value, indent + "  ")
        else:
            print(f"{indent}{key}: {value:.4g}" if isinstance(value, float) else f"{indent}{key}: {value}")
