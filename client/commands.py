"""The device's command. It imports what is heavy only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.status import Status

from fedllm.errors import ConfigError
from fedllm.terminal import console

__all__ = ["app"]

app = typer.Typer()


@app.command(rich_help_panel="Device")
def client(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder that the operator handed out.")],
    data: Annotated[Path | None, typer.Option(help="This device's own texts.")] = None,
    text: Annotated[str, typer.Option(help="Column of the texts, for --check.")] = "text",
    label: Annotated[str, typer.Option(help="Column of the classes, for --check.")] = "label",
    state: Annotated[Path | None, typer.Option(help="Folder of this device's durable state.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory the worker may take, e.g. 2GiB.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads the worker computes with.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Test everything and stop.")] = False,
    pause_on_battery: Annotated[bool, typer.Option("--pause-on-battery")] = False,
    pause_on_metered: Annotated[bool, typer.Option("--pause-on-metered")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="As the server was started.")] = False,
) -> None:
    """Take part in a federation with this device's texts, until Ctrl-C; reconnects for ever."""
    from client import checks, device

    own = checks.Bundle.read(bundle)
    limit = device.parse_bytes(memory) if memory else None
    folder = state or device.state_folder(own)
    if check:
        found = checks.check(own, state=folder, data=data, text=text, label=label, memory=limit)
        for finding in found:
            mark = "ok" if finding.good else "MEND"
            console.print(f"{mark}  {finding.name}: {finding.sentence}", highlight=False)
        if not all(finding.good for finding in found):
            raise ConfigError("mend what is marked before joining")
        return
    here = device.Device(
        own,
        folder,
        data=data,
        memory=limit,
        threads=threads,
        pause_on_battery=pause_on_battery,
        pause_on_metered=pause_on_metered,
        insecure=insecure,
    )
    with Status("connecting", console=console) as line:

        def show(status: str) -> None:
            line.update(status)
            if not console.is_terminal:
                console.print(status, highlight=False)

        device.join(here, report=lambda said: console.print(said, highlight=False), status=show)
