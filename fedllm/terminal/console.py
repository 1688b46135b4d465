"""What all commands share: where they talk, to people and to programs, and the options in common."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any
from unicodedata import category

import typer
from rich.console import Console

from fedllm.host.accelerator import NAMES, VARIABLE, choose_device
from fedllm.runs.durable import to_json

__all__ = [
    "AsJson",
    "Device",
    "Override",
    "RunDir",
    "Source",
    "console",
    "json_wanted",
    "print_event",
    "print_json",
    "results",
    "shown",
]

_OBEYED = ("Cc", "Cs", "Zl", "Zp")
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
WIDE = 1000
"""Columns away from a terminal, where nothing is to be wrapped or cut."""


def _console(*, stderr: bool) -> Console:
    """Return a console to which text is text: brackets are no markup, ``:name:`` is no picture.

    Names, paths and messages come from people, data and other machines; none of them may style a line, lose a
    word from it, or raise.
    """
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE
    return made


console = _console(stderr=True)
"""For people; results go to stdout."""

results = _console(stderr=False)
"""For results that are tables; plain lines are printed."""


def print_json(answer: Any) -> None:
    """Print an answer on stdout, for programs: one strict JSON document."""
    print(to_json(answer, indent=2), flush=True)


def shown(text: str) -> str:
    r"""Return a text without what a terminal obeys: a model may write anything.

    Line breaks and tabs stay; carriage returns go. What turns the direction of writing is no text either.

    >>> shown("a\x1b[2Jb\r\nc\u202e"), shown("\U0001f469\u200d\U0001f680 \u05d0")
    ('a\ufffd[2Jb\nc\ufffd', '\U0001f469\u200d\U0001f680 \u05d0')
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if c not in "\n\t" and (c in _TURNING or category(c) in _OBEYED) else c
        for c in text.replace("\r", "")
    )


def print_event(sentence: str) -> None:
    """Print what a long-lived command has to say, for programs: one JSON object a line."""
    print(to_json({"event": sentence}), flush=True)


def json_wanted() -> bool:
    """Whether the command line asks for JSON: known before it is parsed, so that its errors are JSON too."""
    options = sys.argv[1:]
    return "--json" in options[: options.index("--")] if "--" in options else "--json" in options


Source = Annotated[
    str | None,
    typer.Argument(
        help="Preset (see fedllm presets) or TOML file; default quickstart, and own over texts of one's own.",
        metavar="[PRESET|FILE.toml]",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.key=value; a=1,2,3 makes a run each.", metavar="KEY=VALUE"),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py|MODULE",
        help="Adds methods or codec stages; as installed ones do.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
RunDir = Annotated[Path, typer.Argument(help="Run folder.")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        envvar=VARIABLE,
        callback=choose_device,
        metavar="|".join(NAMES),
        help="Where models compute, here and in all that this starts; auto is cuda, else cpu.",
    ),
]
"""Takes effect by being parsed; no command needs its value."""
