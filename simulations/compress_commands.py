"""The command that makes a smaller base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.errors import ConfigError
from fedllm.terminal.console import AsJson, console, print_json, results
from simulations.results.options import PANEL

__all__ = ["app"]

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def compress(
    base: Annotated[str, typer.Argument(help="A base model, as model.name takes it.")],
    out: Annotated[Path, typer.Argument(help="New folder, which model.name takes then.")],
    data: Annotated[str, typer.Option(help="Texts that everybody may see: as data.name, or a file.")],
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers that stay: those that change most what they are given.")
    ] = None,
    neurons: Annotated[
        float | None, typer.Option(help="Share of each feed-forward block's neurons that stays.")
    ] = None,
    heads: Annotated[
        float | None, typer.Option(help="Share of the groups of attention heads that stays (Llama).")
    ] = None,
    wanda: Annotated[
        str | None, typer.Option(help="Share of each row's weights that become zero, or 2:4.")
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="How many texts are read.")] = 128,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens kept of each text.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Make a smaller base of a model, by what texts show to matter: layers, neurons, heads, weights."""
    from simulations.compressing import Wanted
    from simulations.compressing import compress as make

    if out.exists():
        raise ConfigError(f"{out} exists already; choose a folder that does not")
    wanted = Wanted(layers, neurons, heads, wanda)
    with console.status("measuring what matters"):
        told = make(base, out, wanted, data, texts=texts, max_length=max_length)
    if as_json:
        print_json(told | {"written": str(out)})
        return
    for name, value in told.items():
        results.print(f"{name.replace('_', ' ')}: {f'{value:.4g}' if isinstance(value, float) else value}")
    print(out)
