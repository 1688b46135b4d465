"""What ``fedllm dashboard`` does: find the runs, show the first password once, serve."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from pathlib import Path

from fedllm.errors import ConfigError, FedllmError
from fedllm.terminal import console
from server.dashboard.access import ROLES, Role, welcome
from server.dashboard.app import serve
from server.dashboard.desk import Desk
from server.link import require_free

__all__ = ["open_desk", "secret", "start"]


def open_desk(folder: Path) -> Desk:
    """Open a folder of runs; a federation's folder, or the ``runs`` within it, brings the federation."""
    for federation in (folder, folder.parent):
        if (federation / "federation.toml").is_file() and (federation == folder or folder.name == "runs"):
            return Desk(federation / "runs", federation)
    return Desk(folder)


def secret(folder: Path, *, user: str | None, token: str | None, role: str) -> str:
    """Make a user's password or an API token and return it."""
    accounts = open_desk(folder).accounts
    wanted: Role | None = next((one for one in ROLES if one == role), None)
    if wanted is None:
        raise ConfigError(f"--role is {' or '.join(ROLES)}, not {role!r}")
    if user is not None:
        return accounts.add_user(user, accounts.role_of(user) or wanted)
    return accounts.add_token(token or "", wanted)


def start(folder: Path, *, host: str, port: int, tls: bool | None) -> None:
    """Serve until Ctrl-C.

    Args:
        folder: of runs, or of a federation.
        host: address to listen on.
        port: TCP port.
        tls: with the federation's certificate; None does so beyond localhost where there is one.

    Raises:
        ConfigError: the address is taken, or there is no certificate for TLS.
    """
    desk = open_desk(folder)
    federation = desk.federation
    if tls and federation is None:
        raise ConfigError(f"--tls needs a certificate, and {folder} holds none: fedllm provision makes one")
    encrypted = federation is not None and (tls if tls is not None else not _local(host))
    require_free(host, port, "choose another --port")
    say = console.print
    welcome(desk.accounts, lambda said: say(said, highlight=False, soft_wrap=True))
    if not encrypted and not _local(host):
        say("passwords will cross the network unencrypted: put TLS before this port", style="yellow")
    shown = f"[{host}]" if ":" in host else host
    say(f"dashboard: {'https' if encrypted else 'http'}://{shown}:{port}/", highlight=False, soft_wrap=True)
    certificate = federation / "server.pem" if encrypted and federation else None
    key = federation / "server-key.pem" if encrypted and federation else None
    threading.Thread(target=_prepare, args=(desk,), daemon=True).start()
    serve(desk, host=host, port=port, certificate=certificate, key=key)


def _prepare(desk: Desk) -> None:
    """Read many runs, and what the form for a new one is made from, before somebody waits for them."""
    desk.overviews()
    with contextlib.suppress(FedllmError):  # whoever opens the form is told
        desk.launcher.presets()
        desk.launcher.schemas()
        desk.launcher.document("quickstart")


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
