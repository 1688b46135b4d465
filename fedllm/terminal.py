"""What all commands share: where they talk to people, and the options they have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["AsJson", "Override", "RunDir", "Source", "console"]

console = Console(stderr=True)
"""For people; results go to stdout."""

Source = Annotated[
    str, typer.Argument(help="Preset (see fedllm presets) or TOML file.", metavar="[PRESET|FILE.toml]")
]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.key=value; a=1,2,3 makes a run each.", metavar="KEY=VALUE"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
RunDir = Annotated[Path, typer.Argument(help="Run folder.")]
