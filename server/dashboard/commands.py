"""``fedllm dashboard``: imports what is heavy only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    new_password: Annotated[
        str | None, typer.Option(help="Print a new password for this user, and stop.", metavar="USER")
    ] = None,
    new_token: Annotated[
        str | None, typer.Option(help="Print a new API token of this name, and stop.", metavar="NAME")
    ] = None,
    role: Annotated[str, typer.Option(help="operator or viewer, for a new user or token.")] = "operator",
) -> None:
    """Serve the operator's dashboard over a folder of runs until Ctrl-C."""
    from server.dashboard.start import secret, start

    if new_password is not None or new_token is not None:
        print(secret(runs, user=new_password, token=new_token, role=role))
    else:
        start(runs, host=host, port=port, tls=tls)
