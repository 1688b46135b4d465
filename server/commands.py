"""The operator's commands: keys and server. Each imports what is heavy only when it runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedllm.errors import ConfigError
from fedllm.terminal import console

if TYPE_CHECKING:
    from fedllm.processes import Kept

__all__ = ["app"]

app = typer.Typer()
PANEL = "Server"

Federation = Annotated[Path, typer.Argument(help="Folder made by fedllm provision.")]


@app.command(rich_help_panel=PANEL)
def provision(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation.")],
    server: Annotated[str | None, typer.Option(help="Name or address that devices will dial.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Number of nodes.")] = None,
    port: Annotated[int, typer.Option(help="TCP port of the server.")] = 8000,
    add_node: Annotated[bool, typer.Option("--add-node", help="Make one more bundle.")] = False,
    revoke: Annotated[int | None, typer.Option(help="Forbid a node to join.", metavar="NODE")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Issue a new server certificate.")] = False,
) -> None:
    """Make a federation's certificates and keys: one bundle per node. Private keys are never printed."""
    from server import provision as keys

    if add_node:
        console.print(f"bundle: {keys.add_node(folder)}", highlight=False)
    elif revoke is not None:
        keys.revoke(folder, revoke)
        console.print(f"node {revoke} may not join any more", highlight=False)
    elif renew:
        console.print(f"the new certificate is valid until {keys.renew(folder):%Y-%m-%d}", highlight=False)
    elif server is None or nodes is None:
        raise ConfigError("a new federation needs --server HOST and --nodes N")
    else:
        for bundle in keys.provision(folder, server, nodes, port=port):
            console.print(f"bundle: {bundle}", highlight=False)


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
) -> None:
    """Serve a federation until Ctrl-C: SuperLink with TLS and node authentication, dashboard beside it."""
    from server.link import serve

    beside = [_dashboard(folder, dashboard_port)] if dashboard_port and _dashboard_installed() else []
    serve(folder, bind=bind, insecure=insecure, beside=beside, report=_report)


def _dashboard_installed() -> bool:
    if importlib.util.find_spec("nicegui") is not None:
        return True
    _report("no dashboard: pip install 'fedllm[dashboard]' adds it")
    return False


def _dashboard(folder: Path, port: int) -> Kept:
    """Prepare the dashboard on a local port; its first password is shown here and nowhere else."""
    from fedllm.processes import Child, Kept, open_log
    from server.dashboard.access import Accounts, state_folder, welcome
    from server.link import require_free
    from server.provision import read

    read(folder)  # a folder that is no federation is left as it is
    require_free("127.0.0.1", port, "choose another --dashboard-port, or 0 for none")
    (folder / "runs").mkdir(exist_ok=True)
    _report(f"dashboard: http://127.0.0.1:{port}/")
    welcome(Accounts(state_folder(folder / "runs")), _report)
    command = [sys.executable, "-m", "server.dashboard", str(folder), "--port", str(port)]
    log = open_log(folder / "dashboard.log")
    return Kept("dashboard", lambda: Child(command, {}, log))


def _report(sentence: str) -> None:
    console.print(sentence, highlight=False, soft_wrap=True)
