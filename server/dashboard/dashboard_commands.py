"""``fedllm dashboard``: imports what is heavy only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.terminal.console import AsJson, console, print_event, print_json
from server.dashboard import require_installed

__all__ = ["app"]

app = typer.Typer()


@app.command(rich_help_panel="Server")
def dashboard(
    runs: Annotated[Path, typer.Argument(help="Folder of runs, or of a federation.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 8080,
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--no-tls", help="TLS with the federation's certificate; default beyond localhost."
        ),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(
            help="Address or network of a proxy whose X-Forwarded-For and -Proto are believed; repeatable.",
            metavar="ADDRESS",
        ),
    ] = None,
    new_password: Annotated[
        str | None, typer.Option(help="Print a new password for this user, and stop.", metavar="USER")
    ] = None,
    new_token: Annotated[
        str | None, typer.Option(help="Print a new API token of this name, and stop.", metavar="NAME")
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(help="operator or viewer; default operator, for a user that is known the role it has."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve the operator's dashboard over a folder of runs until Ctrl-C."""
    require_installed()
    from server.dashboard.start import secret, start

    if new_password is not None or new_token is not None:
        made = secret(runs, user=new_password, token=new_token, role=role)
        if as_json:
            print_json({"password" if new_password is not None else "token": made})
        else:
            print(made)
    else:
        report = print_event if as_json else console.print
        start(runs, host=host, port=port, tls=tls, trusted_proxies=trusted_proxy or [], report=report)
