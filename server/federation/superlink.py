"""Flower's SuperLink as a process of its own, closed towards all but authenticated nodes and its operator.

Flower 1.42 serves everything on one port, and only its Fleet API checks who calls: whoever reaches the port
could start a run - any code, on the server and on every node - or take a task from the Runtime API. Here both
answer to this host alone; the Control API to whoever can read the federation's token, the Runtime API to the
processes that hold its secret. Both are files of mode 0600: other users of the host are kept out as well. An
operator elsewhere comes through ssh.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.superlink import extensions
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedllm.host.processes import allow_slow_starts, die_with_parent, hand_secret
from server.federation.bodies import MEMBER, STRANGER, Allowance, BoundedBodies, signer
from server.federation.tokens import BOUND, EXECUTOR, TOKEN, TOKEN_HEADER
from server.federation.uploads import LIMITS, Limits, Uploads
from server.patience import PromptHeads

__all__ = ["Gate", "main"]

OPEN = ("/v1/fleet/", "/health")
CONTROL = "/v1/control/"
PUSH_OBJECT = "/v1/fleet/push-object"


class Gate:
    """ASGI middleware: the Fleet API and the health route are open, all else is for this host alone.

    Args:
        app: what is behind it.
        token: what a caller of the Control API must show.
        bound: the one address that the SuperLink listens on; calls from that very address are this host's.
    """

    def __init__(self, app: ASGIApp, token: str, bound: str) -> None:
        self._app, self._token, self._bound = app, token, bound

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it with status 401 or 403."""
        if scope["type"] == "lifespan" or scope["path"].startswith(OPEN):
            await self._app(scope, receive, send)
        elif not self._is_local(scope):
            refusal = PlainTextResponse("only the server's own host may call this\n", status_code=403)
            await refusal(scope, receive, send)
        elif scope["path"].startswith(CONTROL) and not self._knows(scope):
            refusal = PlainTextResponse("only who can read the federation's token may call this\n", 401)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        shown = Headers(scope=scope).get(TOKEN_HEADER, "")
        return hmac.compare_digest(shown.encode(), self._token.encode())

    def _is_local(self, scope: Scope) -> bool:
        client = scope.get("client")
        if client is None:
            return False
        address = ipaddress.ip_address(client[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback) or client[0] == self._bound


def _allowance(scope: Scope) -> Allowance:
    """Allow nodes that may join, and this host, more than anybody else."""
    if not scope["path"].startswith(OPEN):
        return MEMBER  # the gate has let it pass
    key, state = signer(scope), scope["app"].state
    if key is None:
        return STRANGER
    known = not state.enable_supernode_auth or _state(scope).get_node_id_by_public_key(key)
    return MEMBER if known else STRANGER


def _state(scope: Scope) -> LinkState:
    state: LinkState = scope["app"].state.linkstate_factory.state()
    return state


def _break_off(uploads: Uploads, scope: Scope) -> None:
    """Refuse the whole reply of a node that sends a piece which is too large or too slow."""
    key = signer(scope)
    node = None if key is None else _state(scope).get_node_id_by_public_key(key)
    if node is not None and scope["path"] == PUSH_OBJECT:
        uploads.refuse(node, _state(scope), "a piece of it is too large or too slow")


def _require_secret(secret: bytes, app: FastAPI) -> None:
    """Let the Runtime API hand tasks to nobody but an executor that knows the secret."""
    app.state.superexec_auth_secret = secret


def main() -> None:
    """Run ``flower-superlink`` with this process's arguments behind the middleware."""
    die_with_parent()
    allow_slow_starts(in_memory_corestate, sql_corestate)
    folder = Path(os.environ["FLWR_HOME"])
    # Flower's own hooks; its enterprise package is the only other one to fill them.
    gate = Middleware(Gate, token=(folder / TOKEN).read_text(), bound=(folder / BOUND).read_text())
    uploads = Uploads(Limits(folder / LIMITS).of)
    uploads.watch()
    bodies = Middleware(BoundedBodies, allowance=_allowance, refused=partial(_break_off, uploads))
    extensions.get_middleware = lambda: (gate, bodies)
    extensions.configure_app = partial(_require_secret, (folder / EXECUTOR).read_bytes())
    hand_secret(sys.modules[flower_superlink.__module__], folder / EXECUTOR)
    # Flower leaves no choice of the protocol, and uvicorn's own waits for a request's head for ever.
    prompt = SimpleNamespace(run=partial(uvicorn.run, http=PromptHeads))
    superexec = SimpleNamespace(Popen=_start_superexec, TimeoutExpired=subprocess.TimeoutExpired)
    vars(sys.modules[flower_superlink.__module__]).update(uvicorn=prompt, subprocess=superexec)
    flower_superlink()


def _start_superexec(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "server.federation.superexec", *command[1:]], **options)


if __name__ == "__main__":
    main()
