"""The command line, put together from the entry points in the group ``fedllm.commands``.

Every room defines its own commands; none imports torch, transformers or Flower before it has to. Results go
to stdout, everything else to stderr. Exit codes: 0 done, 1 the run failed, 2 wrong usage or configuration,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points, version
from typing import Annotated

import click
import typer

from fedllm.errors import FedllmError, Interrupted, refused_by_the_system
from fedllm.terminal.console import console, json_wanted, print_json

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedllm",
    help="Federated fine-tuning of language models: only small, compressed deltas cross the network.",
    no_args_is_help=True,
    suggest_commands=False,  # click says it already
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_FIRST = ("simulations", "results", "server", "dashboard", "client")
"""Whose commands the help shows first; what plug-ins add comes after them."""


def _add_commands() -> None:
    parts = {entry.name: entry for entry in entry_points(group="fedllm.commands")}
    if missing := [name for name in _FIRST if name not in parts]:
        raise RuntimeError(f"fedllm is not installed whole, {missing[0]} is missing: pip install it again")
    for name in (*_FIRST, *sorted(parts.keys() - set(_FIRST))):
        app.add_typer(parts[name].load())


_add_commands()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fedllm {version('fedllm')}")
        raise typer.Exit


@app.callback()
def _options(
    shown: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Run the command line; a user's mistake gives one sentence and an exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    sys.exit(_exit_code())


def _exit_code() -> int:
    try:
        # Typer turns Ctrl-C into a code that it returns.
        code = app(standalone_mode=False, prog_name="fedllm")
        if code == Interrupted.exit_code:
            raise Interrupted("interrupted")
        return code or 0
    except click.ClickException as error:
        error.show()
        return _failed(error, error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _said(Interrupted("interrupted"))
    except FedllmError as error:
        return _said(error)
    except Exception as error:
        if isinstance(error, OSError) and (refusal := refused_by_the_system(error)) is not None:
            return _said(refusal)
        _failed(error, str(error), 1)
        raise  # a fault of fedllm's own keeps its traceback


def _said(error: FedllmError) -> int:
    sentence = str(error) if isinstance(error, Interrupted) else f"error: {error}"
    console.print(sentence, style="red")
    return _failed(error, str(error), error.exit_code)


def _failed(error: Exception, message: str, code: int) -> int:
    """Answer with an error where JSON was asked for; the exit code stays what it is."""
    if json_wanted():
        print_json({"error": {"kind": type(error).__name__, "message": message, "exit_code": code}})
    return code
