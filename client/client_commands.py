"""The device's command. It imports what is heavy only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.status import Status
from rich.text import Text

from fedllm.errors import ConfigError
from fedllm.terminal.console import AsJson, Device, console, print_event, print_json

if TYPE_CHECKING:
    from client.device import participation

__all__ = ["app"]

app = typer.Typer()


@app.command(rich_help_panel="Device")
def client(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder that the operator handed out.")],
    data: Annotated[Path | None, typer.Option(help="This device's own texts.")] = None,
    text: Annotated[str, typer.Option(help="Column of the texts, to count and check them.")] = "text",
    label: Annotated[
        str, typer.Option(help="Column of the classes, to check them; empty where there is none.")
    ] = "label",
    state: Annotated[Path | None, typer.Option(help="Folder of this device's durable state.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory the worker may take, e.g. 2GiB.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads the worker computes with.")] = None,
    idle_unload: Annotated[
        float,
        typer.Option(min=0, help="Seconds without work until the worker ends; 0: never."),
    ] = 60.0,
    keep_runs: Annotated[int, typer.Option(min=1, help="Runs whose state is kept on this device.")] = 4,
    state_limit: Annotated[
        str | None, typer.Option(help="Most that the state of all runs may take, e.g. 2GiB.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Test everything and stop.")] = False,
    run: Annotated[
        str | None, typer.Option(help="With --check: try this run here.", metavar="PRESET|FILE.toml")
    ] = None,
    pause_on_battery: Annotated[
        bool, typer.Option("--pause-on-battery", help="Wait while it runs on battery.")
    ] = False,
    pause_on_metered: Annotated[
        bool, typer.Option("--pause-on-metered", help="Wait while its network is metered.")
    ] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="As the server was started.")] = False,
    secure_only: Annotated[
        bool, typer.Option("--secure-only", help="Refuse runs without secure aggregation.")
    ] = False,
    peers: Annotated[
        Path | None,
        typer.Option(
            help="Certificates (node.pem, one after the other) of those with whom this device sits in a "
            "secure sum; it takes part in no other runs.",
            metavar="FILE",
        ),
    ] = None,
    accelerator: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Take part in a federation with this device's texts, until Ctrl-C; reconnects for ever."""
    from client.device import participation, supervisor
    from client.device.bundle import Bundle
    from client.device.collection import Bounds

    own = Bundle.read(bundle)
    here = participation.Device(
        own,
        state or participation.state_folder(own),
        data=data,
        text=text,
        label=label or None,
        memory=participation.parse_bytes(memory) if memory else None,
        threads=threads,
        idle_unload=idle_unload,
        bounds=Bounds(keep_runs, participation.parse_bytes(state_limit) if state_limit else 0),
        pause_on_battery=pause_on_battery,
        pause_on_metered=pause_on_metered,
        insecure=insecure,
        secure_only=secure_only,
        peers=peers,
    )
    if check:
        _check(here, run, as_json)
        return
    if run is not None:
        raise ConfigError("--run goes with --check; a device takes part in whatever run its server starts")
    report = print_event if as_json else console.print
    with Status("connecting", console=console) as line:

        def show(status: str) -> None:
            line.update(Text(status))  # a plain string would be read as markup
            if as_json or not console.is_terminal:
                report(status)

        supervisor.join(here, report=report, status=show)


def _check(here: participation.Device, run: str | None, as_json: bool) -> None:
    """Say what is ready and what is not; raises ``ConfigError`` where something is not."""
    from client.device.checks import check, check_peers
    from client.device.trial import try_run

    found = check(
        here.bundle,
        state=here.state,
        data=here.data if run is None else None,  # the run names its own columns
        text=here.text,
        label=here.label,
        memory=here.memory,
        insecure=here.insecure,
    )
    if (vain := here.pauses_in_vain()) is not None:
        found.append(vain)
    if here.peers is not None:
        found.append(check_peers(here.bundle, here.peers, insecure=here.insecure))
    if run is not None:
        found += try_run(run, here.bundle.node, here.data, here.memory)
    bad = [finding for finding in found if not finding.good]
    if as_json and not bad:
        print_json([finding._asdict() for finding in found])
    for finding in found:
        mark = "ok" if finding.good else "fix:"
        console.print(f"{mark}  {finding.name}: {finding.sentence}")
    if bad:
        raise ConfigError(f"mend before joining: {', '.join(finding.name for finding in bad)}")
