"""What ``fedllm dashboard`` does: find the runs, show the first password once, serve."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fedllm.errors import ConfigError, FedllmError
from server.dashboard.actions.operations import Operations
from server.dashboard.app import serve
from server.dashboard.door.access import ROLES, Role, welcome
from server.federation.link import require_free

__all__ = ["open_operations", "secret", "start"]


def open_operations(folder: Path) -> Operations:
    """Open a folder of runs; a federation's folder, or the ``runs`` within it, brings the federation."""
    for federation in (folder, folder.parent):
        if (federation / "federation.toml").is_file() and (federation == folder or folder.name == "runs"):
            return Operations(federation / "runs", federation)
    return Operations(folder)


def secret(folder: Path, *, user: str | None, token: str | None, role: str | None) -> str:
    """Make a user's password or an API token and return it.

    Args:
        folder: of runs, or of a federation.
        user: who gets a new password; made if there is none of this name.
        token: name of a new token, where ``user`` is None.
        role: of the user or token. Unset keeps a user's own role, and makes an operator of a new user or
            where nobody is operator any more: whoever can run this holds the server anyway.
    """
    accounts = open_operations(folder).accounts
    wanted: Role | None = next((one for one in ROLES if one == role), None)
    if role is not None and wanted is None:
        raise ConfigError(f"--role is {' or '.join(ROLES)}, not {role!r}")
    if user is None:
        return accounts.add_token(token or "", wanted or "operator")
    if accounts.role_of(user) is None:
        return accounts.add_user(user, wanted or "operator")
    leaderless = all(row["role"] != "operator" for row in accounts.users())
    return accounts.renew_password(user, wanted or ("operator" if leaderless else None))


def start(
    folder: Path,
    *,
    host: str,
    port: int,
    tls: bool | None,
    trusted_proxies: Sequence[str] = (),
    report: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C.

    Args:
        folder: of runs, or of a federation.
        host: address to listen on.
        port: TCP port.
        tls: with the federation's certificate; None does so beyond localhost where there is one.
        trusted_proxies: see :func:`server.dashboard.app.create`.
        report: receives what the operator must know: the address, the first password.

    Raises:
        ConfigError: the address is taken, there is no certificate for TLS, or a proxy is no address.
    """
    for proxy in trusted_proxies:
        _require_network(proxy)
    ops = open_operations(folder)
    federation = ops.federation
    if tls and federation is None:
        raise ConfigError(f"--tls needs a certificate, and {folder} holds none: fedllm provision makes one")
    encrypted = federation is not None and (tls if tls is not None else not _local(host))
    require_free(host, port, "choose another --port")
    welcome(ops.accounts, report)
    if not encrypted and not _local(host):
        report("passwords will cross the network unencrypted: put TLS before this port")
    shown = f"[{host}]" if ":" in host else host
    report(f"dashboard: {'https' if encrypted else 'http'}://{shown}:{port}/")
    certificate = federation / "server.pem" if encrypted and federation else None
    key = federation / "server-key.pem" if encrypted and federation else None
    threading.Thread(target=_prepare, args=(ops,), daemon=True).start()
    serve(ops, host=host, port=port, certificate=certificate, key=key, trusted_proxies=trusted_proxies)


def _prepare(ops: Operations) -> None:
    """Read many runs, and what the form for a new one is made from, before somebody waits for them."""
    ops.overviews()
    with contextlib.suppress(FedllmError):  # whoever opens the form is told
        ops.launcher.presets()
        ops.launcher.schemas()
        ops.launcher.document("quickstart")


def _require_network(proxy: str) -> None:
    try:
        ipaddress.ip_network(proxy)
    except ValueError as error:
        raise ConfigError(
            f"--trusted-proxy takes an address or a network such as 10.0.0.0/8: {error}"
        ) from None


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
