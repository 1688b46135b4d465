"""The operator's commands: keys, server, and runs on it. Each imports what is heavy only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.errors import ConfigError, Interrupted
from fedllm.extras import installed
from fedllm.terminal.console import (
    AsJson,
    Device,
    Override,
    Plugin,
    Source,
    console,
    print_event,
    print_json,
)

if TYPE_CHECKING:
    from fedllm.config import RunConfig
    from fedllm.host.processes import Kept
    from server.federation.submit import Submitted

__all__ = ["app"]

app = typer.Typer()
PANEL = "Server"

Federation = Annotated[Path, typer.Argument(help="Folder made by fedllm provision.")]


@app.command(rich_help_panel=PANEL)
def provision(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation.")],
    server: Annotated[str | None, typer.Option(help="Name or address that devices will dial.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Number of nodes.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port of the server; default 8000.")] = None,
    add_node: Annotated[bool, typer.Option("--add-node", help="Make one more bundle.")] = False,
    revoke: Annotated[int | None, typer.Option(help="Forbid a node to join.", metavar="NODE")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Issue a new server certificate.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a federation's certificates and keys: one bundle per node. Private keys are never printed."""
    from server.federation import provision as keys

    change = {"--revoke": revoke is not None, "--renew": renew, "--add-node": add_node}
    new = {"--server": server is not None, "--nodes": nodes is not None, "--port": port is not None}
    given = [name for name, there in {**change, **new}.items() if there]
    if any(change.values()) and len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} are two orders; give them one after the other")
    if revoke is not None:
        keys.revoke(folder, revoke)
        _done({"revoked": revoke}, [f"node {revoke} may not join any more"], as_json)
    elif renew:
        until = f"{keys.renew(folder):%Y-%m-%d}"
        _done({"valid_until": until}, [f"the new certificate is valid until {until}"], as_json)
    elif add_node:
        _bundles([keys.add_node(folder)], as_json)
    elif server is None or nodes is None:
        raise ConfigError("a new federation needs --server HOST and --nodes N")
    else:
        _bundles(keys.provision(folder, server, nodes, port=8000 if port is None else port), as_json)


def _bundles(made: Sequence[Path], as_json: bool) -> None:
    _done({"bundles": [str(path) for path in made]}, [f"bundle: {path}" for path in made], as_json)


def _done(answer: dict[str, object], sentences: list[str], as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        for sentence in sentences:
            console.print(sentence)


@app.command(rich_help_panel=PANEL)
def server(
    folder: Federation,
    bind: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no authentication: anybody may join and read.")
    ] = False,
    dashboard_port: Annotated[
        int, typer.Option("--dashboard-port", min=0, help="Local port of the dashboard; 0 starts none.")
    ] = 8080,
    go_on: Annotated[
        bool,
        typer.Option("--resume", help="Go on with runs that were under way when the server went down."),
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Serve a federation until Ctrl-C: SuperLink with TLS and node authentication, dashboard beside it."""
    from server.federation.serving import serve

    report = print_event if as_json else console.print
    there = bool(dashboard_port) and _dashboard_installed(report)
    beside = [_dashboard(folder, dashboard_port, report)] if there else []
    serve(folder, bind=bind, insecure=insecure, beside=beside, go_on=go_on, report=report)


def _dashboard_installed(report: Callable[[str], None]) -> bool:
    if installed("nicegui"):
        return True
    report("no dashboard: pip install 'fedllm[dashboard]' adds it")
    return False


def _dashboard(folder: Path, port: int, report: Callable[[str], None]) -> Kept:
    """Prepare the dashboard on a local port; its first password is shown here and nowhere else."""
    from fedllm.host.processes import Child, Kept, open_log
    from server.dashboard.door.access import Accounts, state_folder, welcome
    from server.federation.link import require_free
    from server.federation.provision import read

    read(folder)  # a folder that is no federation is left as it is
    require_free("127.0.0.1", port, "choose another --dashboard-port, or 0 for none")
    (folder / "runs").mkdir(exist_ok=True)
    report(f"dashboard: http://127.0.0.1:{port}/")
    welcome(Accounts(state_folder(folder / "runs")), report)
    command = [sys.executable, "-m", "server.dashboard", str(folder), "--port", str(port)]
    log = open_log(folder / "dashboard.log")
    return Kept("dashboard", lambda: Child(command, {}, log))


@app.command(rich_help_panel=PANEL)
def run(
    source: Source = None,
    federation: Annotated[
        Path, typer.Option("--server", help="Folder of the federation that is being served on this host.")
    ] = Path(),
    overrides: Override = None,
    plugin: Plugin = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and return.")] = False,
    resume: Annotated[str | None, typer.Option(help="Go on with a run.", metavar="RUN")] = None,
    rounds: Annotated[
        str | None, typer.Option(help="With --resume: +5 rounds more, or 20 in all.", metavar="+N|N")
    ] = None,
    stop: Annotated[str | None, typer.Option(help="Stop a run after its round.", metavar="RUN")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to a federation and follow it; Ctrl-C stops following, the run goes on."""
    from fedllm.terminal.live import Watcher
    from server.federation import submit
    from server.federation.link import reached
    from server.federation.serving import await_link

    new = {"a preset or file": source, "--set": overrides, "--plugin": plugin, "--dry-run": dry_run}
    if resume is not None or stop is not None:
        if resume is not None and stop is not None:
            raise ConfigError("--resume and --stop are two orders; give one")
        if meant := [name for name, given in new.items() if given]:
            raise ConfigError(f"{meant[0]} is for a new run; --resume and --stop are for one that is there")
    if dry_run:
        config = _new(source, overrides or [], plugin)
        if as_json:
            print_json(config.to_document())
        else:
            print(config.to_toml(), end="")
        return
    if rounds is not None and resume is None:
        raise ConfigError("--rounds goes with --resume RUN; a new run is told by --set rounds=...")
    with reached(federation) as control:
        await_link(federation, control)
        if stop is not None:
            submitted = submit.find(federation, stop)
            submit.stop(control, submitted)
            _told(submitted, as_json)
            return
        if resume is not None:
            submitted = submit.resume(federation, control, resume, rounds)
        else:
            submitted = submit.submit(federation, control, _new(source, overrides or [], plugin))
        console.print(f"run {submitted.id}: {submitted.folder}")
        if not detach:
            try:
                with Watcher(console) as watcher:
                    submit.follow(control, submitted, look=watcher.update)
            except KeyboardInterrupt:
                ending = f"fedllm run --stop {submitted.folder.name} --server {federation}"
                raise Interrupted(f"no longer followed; the run goes on ({ending} ends it)") from None
        _told(submitted, as_json)


def _new(source: str | None, overrides: list[str], plugins: list[str] | None) -> RunConfig:
    """Return a new run of a federation: classes, and what nobody gave, by the server's own texts."""
    from fedllm.presets import document
    from fedllm.tasks import with_classes
    from strategies.private import promise
    from strategies.registry import resolve_run
    from strategies.starting_point import StartingPoint, usual_source

    start = document(source or usual_source(overrides), plugins)
    choose = StartingPoint(console.print, deployed=True)
    config = resolve_run(start, overrides)
    config.placed(deployed=True)  # refuses what only a simulation can do
    if config.privacy.hides:
        console.print(promise(config))
    return with_classes(choose(config))


def _told(submitted: Submitted, as_json: bool) -> None:
    from fedllm.runs.reader import Run
    from fedllm.runs.records import FILE

    if as_json:
        summary = Run(submitted.folder).summary if (submitted.folder / FILE).is_file() else None
        print_json({"id": submitted.id, "folder": str(submitted.folder), "summary": summary})
