"""The researcher's commands that run nothing: what there is, what came out, what a run's model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.errors import ConfigError, StoreError
from fedllm.measures import in_order
from fedllm.terminal.console import AsJson, Device, Plugin, RunDir, console, print_json, results, shown
from fedllm.wording import number
from simulations.bench import BENCHMARKS
from simulations.results import talk_commands
from simulations.results.options import PANEL, AtRound, Format, read_text, which

if TYPE_CHECKING:
    from fedllm.data.reading import Row

__all__ = ["app", "compare"]

app = typer.Typer()
app.add_typer(talk_commands.app)
FILES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx", ".zip", ".gz", ".tar"}
"""Endings of files; what is exported is a folder."""
TABLES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"}
"""Endings of what ``data.path`` takes; a line of it is no text."""


@app.command(rich_help_panel=PANEL)
def presets(as_json: AsJson = False) -> None:
    """List the presets and what each costs."""
    from rich.table import Table

    from fedllm.presets import presets as load

    found = load()
    if as_json:
        print_json([{"name": p.name, "shows": p.shows, "costs": p.costs} for p in found])
        return
    table = Table("preset", "shows", "costs")
    for preset in found:
        table.add_row(preset.name, preset.shows, preset.costs)
    results.print(table)


@app.command(rich_help_panel=PANEL)
def keys(
    begin: Annotated[
        str, typer.Argument(help="Only keys that begin so, such as data.", metavar="[START]")
    ] = "",
    plugins: Plugin = None,
    as_json: AsJson = False,
) -> None:
    """List the keys of a configuration: what each takes, its default and its meaning."""
    from rich.table import Table

    from fedllm.plugins import load
    from simulations.keys import keys as every

    load(plugins or [])
    found = [key for key in every() if key.name.startswith(begin)]
    if not found:
        raise ConfigError(f"no key begins with {begin!r}; fedllm keys lists all")
    if as_json:
        print_json([dataclasses.asdict(key) for key in found])
        return
    table = Table("key", "takes", "default", "meaning")
    for key in found:
        table.add_row(key.name, key.takes, key.default, key.meaning)
    results.print(table)


@app.command(rich_help_panel=PANEL)
def codecs(plugins: Plugin = None, as_json: AsJson = False) -> None:
    """List the codec stages with their bits, properties and cost."""
    from rich.table import Table

    from fedllm.codecs.catalogue import catalogue
    from fedllm.plugins import load

    load(plugins or [])
    rows = [dataclasses.asdict(entry) for entry in catalogue()]
    if as_json:
        print_json(rows)
        return
    table = Table("stage", "bits per value", "properties of the example", "what it does")
    for row in rows:
        properties = [name for name in ("linear", "unbiased", "contractive", "stateful") if row[name]]
        table.add_row(row["name"], row["bits"], ", ".join(properties), f"{row['summary']}\n{row['example']}")
    results.print(table)


@app.command(rich_help_panel=PANEL)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of runs.")],
    plots: Annotated[Path | None, typer.Option(help="Also write overlaid plots into this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set runs side by side: quality, bytes and time; repeats over seeds as mean and interval."""
    from simulations.results import compare as comparison

    found = comparison.compare(runs)
    if plots is not None:
        for path in comparison.draw(runs, plots):
            console.print(path)
    if as_json:
        print_json(found)
    else:
        results.print(comparison.table(found))


@app.command(rich_help_panel=PANEL)
def report(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Write a run's self-contained report.html and its plots."""
    from simulations.results.report import write

    _written(write(run_dir), as_json)


@app.command(rich_help_panel=PANEL)
def predict(
    run_dir: RunDir,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; - reads them from stdin.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="UTF-8 file of texts, one a line, or a data file (jsonl, csv, ...).")
    ] = None,
    round: AtRound = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer texts with a run's model, or rows of a data file, as the run's task does."""
    from simulations.results.predict import lines
    from simulations.results.predict import predict as answer

    answers = answer(run_dir, _asked(texts or [], file), which(round))
    if as_json:
        print_json(answers)
        return
    for line in lines(run_dir, answers):
        print(shown(line))


@app.command(rich_help_panel=PANEL)
def evaluate(
    run_dir: RunDir,
    on: Annotated[
        Path | None,
        typer.Option(help="Another run's folder, for its test set, or a data file; default the run's own."),
    ] = None,
    round: AtRound = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a run's model on its test set, on another run's, or on the rows of a data file."""
    from simulations.results.scoring import evaluate as score

    found = score(run_dir, on, which(round))
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    told = ", ".join(f"{name} {number(found.metrics[name])}" for name in in_order(found.metrics))
    print(f"{told} on {found.texts:,} texts, after round {found.round}")
    if found.trained_on is None:
        print(
            "the texts that the run was trained on are not at hand: whether these are among them is not known"
        )
    elif found.trained_on:
        print(
            f"{found.trained_on:,} of them stand among the texts that the run shares out for training, so "
            "that its scores may be too good"
        )


def _asked(given: Sequence[str], file: Path | None) -> Sequence[str | Row]:
    """Return the texts of the command line, of standard input or of a text file, or a table's rows."""
    if file is None or given or not TABLES & {suffix.lower() for suffix in file.suffixes}:
        return _texts(given, file)
    from fedllm.config import DataConfig
    from fedllm.data.reading import read_rows

    return list(read_rows(DataConfig(path=str(file))))


def _texts(given: Sequence[str], file: Path | None) -> list[str]:
    """Return the texts of the command line, of a file, or of standard input, one a line."""
    if file is not None and given:
        raise ConfigError("predict takes texts or --file, not both")
    if file is None and list(given) != ["-"]:
        if not given:
            raise ConfigError("predict needs texts, - for standard input, or --file FILE")
        return list(given)
    return read_text(file).split("\n")


@app.command(rich_help_panel=PANEL)
def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Argument(help="New folder to write to.")],
    round: AtRound = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="merged: a plain transformers model, the adapter in its weights; onnx: a graph for ONNX "
            "Runtime; int8, int4: that quantised; gguf, gguf-q8_0, gguf-q4_k: a file for llama.cpp in "
            "float16, in eight bits, in about five. Default: what the run trained, an adapter or a model.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="With --format: score it in its own runtime on the run's test set."),
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a run's result for other programs: peft's adapter, a transformers model, a graph, a GGUF file."""
    if out.suffix.lower() in FILES:
        raise ConfigError(
            f"export writes a folder, in peft's format or transformers', and no {out.suffix} file: "
            f"name a folder such as {out.with_suffix('')}"
        )
    if out.exists():
        raise ConfigError(f"{out} exists already; choose a folder that does not")
    if check and format is None:
        raise ConfigError("--check goes with --format: without one, what is written is compared anyway")
    if format is None:
        from simulations.results.predict import export as write

        write(run_dir, out, which(round))
        _written(out, as_json)
        return
    from simulations.results.shipping.ship import ship

    with console.status("writing, and loading it again"):
        _, compared = ship(run_dir, out, format, which(round), check=check)
    found = {} if compared is None else dataclasses.asdict(compared)
    if as_json:
        print_json({"written": str(out), "format": format, **({"check": found} if found else {})})
        return
    _print_nested(found)
    print(out)


@app.command(rich_help_panel=PANEL)
def verify(
    run_dir: RunDir,
    reply: Annotated[
        str | None,
        typer.Option(
            help="Also say which round counted this reply, as its device logged it.", metavar="DIGEST"
        ),
    ] = None,
    authority: Annotated[
        Path | None,
        typer.Option(
            help="The federation's ca.pem: its server and its nodes must have signed.", metavar="FILE"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a run's chain of signed rounds, offline; ends with 1 at the first link that does not hold."""
    from fedllm.runs.provenance.verify import sentences, verify

    found = verify(run_dir, authority)
    counted = None if reply is None else found.counted(reply)
    if reply is not None and counted is None:
        raise StoreError(f"no round of {run_dir} counted a reply {reply}")
    if as_json:
        print_json({**found.told(), **({} if reply is None else {"reply": counted})})
        return
    for line in sentences(found, counted):
        print(line)


def _written(path: Path, as_json: bool) -> None:
    if as_json:
        print_json({"written": str(path)})
    else:
        print(path)


@app.command(rich_help_panel=PANEL)
def bench(
    what: Annotated[str, typer.Argument(help=f"all, or one of {', '.join(BENCHMARKS)}.", metavar="WHAT")],
    fuzz: Annotated[int, typer.Option(help="codecs: also decode this many mutated payloads.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="codecs: draw error against bits a value as PNG.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="all: this benchmark; may be given again.", metavar="WHAT")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="all: keeps what was measured, so that what was cut short goes on; default runs/bench."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="all: measure again what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what the documentation states, side by side with what it is compared to; all: every goal."""
    from importlib import import_module

    if what not in ("all", *BENCHMARKS):
        raise ConfigError(f"there is no benchmark {what!r}; benchmarks are all, {', '.join(BENCHMARKS)}")
    if what != "codecs" and (fuzz or plot):
        raise ConfigError(f"--fuzz and --plot belong to fedllm bench codecs, not to {what}")
    if what == "all":
        _judge(only or [], out or Path("runs/bench"), fresh, as_json)
        return
    if only or fresh or out:
        raise ConfigError(f"--only, --fresh and --out belong to fedllm bench all, not to {what}")
    options = {"fuzz": fuzz} if what == "codecs" else {}
    benchmark = import_module(f"simulations.bench.{what}")
    found = benchmark.run(**options)
    if plot is not None:
        benchmark.draw(found, plot)
    if as_json:
        print_json(found)
    else:
        _print_nested(found)


def _judge(only: list[str], out: Path, fresh: bool, as_json: bool) -> None:
    """Print every goal with what was measured."""
    from rich.table import Table

    from simulations.bench import targets

    outcomes = targets.judge(out, only, fresh=fresh, report=lambda sentence: console.print(shown(sentence)))
    if as_json:
        print_json(outcomes)
        return
    table = Table("what", "measured", "goal", "verdict", "fedllm bench")
    for row in outcomes:
        measured = number(row["value"])
        table.add_row(*map(shown, (row["what"], measured, row["goal"], row["verdict"], row["bench"])))
    results.print(table)


def _print_nested(found: Any, indent: str = "") -> None:
    """Print nested results as indented lines, numbers short."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if isinstance(value, dict | list):
            print(f"{indent}{key}")
            _print_nested(value, indent + "  ")
        else:
            print(f"{indent}{key}: {value:.4g}" if isinstance(value, float) else f"{indent}{key}: {value}")
