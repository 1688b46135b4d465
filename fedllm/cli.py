"""The command line: the composition root, and the one module of fedllm that knows the layers above it.

Every layer defines its own commands; none imports torch, transformers or Flower before it has to. Results go
to stdout, everything else to stderr. Exit codes: 0 done, 1 the run failed, 2 wrong usage or configuration,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from client import commands as device
from fedllm.errors import ConfigError, DataError, FedllmError, ModelError
from fedllm.terminal import Override, Source, console
from server import commands as operator
from server.dashboard import commands as dashboard
from simulations import commands as researcher

if TYPE_CHECKING:
    from fedllm.config import RunConfig

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedllm",
    help="Federated fine-tuning of language models: only small, compressed deltas cross the network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (researcher, operator, dashboard, device):
    app.add_typer(part.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fedllm {version('fedllm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command(rich_help_panel="Server")
def run(
    source: Source = "quickstart",
    federation: Annotated[
        Path, typer.Option("--server", help="Folder of the federation that is being served on this host.")
    ] = Path(),
    overrides: Override = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and return.")] = False,
    resume: Annotated[str | None, typer.Option(help="Go on with a run.", metavar="RUN")] = None,
    stop: Annotated[str | None, typer.Option(help="Stop a run after its round.", metavar="RUN")] = None,
) -> None:
    """Submit a run to a federation and follow it; Ctrl-C stops following, the run goes on."""
    from fedllm.live import Watcher
    from server import submit
    from server.link import connect
    from simulations.catalogue import document
    from strategies.registry import resolve_run

    with connect(federation) as control:
        if stop is not None:
            submit.stop(control, submit.find(federation, stop))
            return
        if resume is not None:
            submitted = submit.resume(federation, control, resume)
        else:
            config = _with_classes(resolve_run(document(source), overrides or []))
            submitted = submit.submit(federation, control, config)
        console.print(f"run {submitted.id}: {submitted.folder}", highlight=False)
        if not detach:
            with Watcher(console) as watcher:
                submit.follow(control, submitted, look=watcher.update)


def _with_classes(config: RunConfig) -> RunConfig:
    """Fix the classes and their order by the server's own texts: a device may lack some of them."""
    from fedllm.data import load

    if config.model.task != "classification" or config.data.classes:
        return config
    classes = load(config.data, config.model.task).label_names
    return config.model_copy(update={"data": config.data.model_copy(update={"classes": classes})})


def main() -> None:
    """Run the command line; a user's mistake gives one sentence and an exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        app(standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        console.print("interrupted; what was finished is kept, and fedllm resume continues a run")
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FedllmError as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2 if isinstance(error, ConfigError | DataError | ModelError) else 1
    return 0
