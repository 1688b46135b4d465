"""Flower's SuperLink as a process of its own, closed towards the network except for authenticated nodes.

Flower 1.42 serves everything on one port, and only its Fleet API checks who calls: whoever reaches the port
could start a run - any code, on the server and on every node - or take a task from the Runtime API. Both
answer to this host alone here; an operator elsewhere comes through ssh.
"""

from __future__ import annotations

import ipaddress

from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.superlink import extensions
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedllm.processes import allow_slow_starts, die_with_parent

__all__ = ["OnlyNodesFromOutside", "main"]

OPEN = ("/v1/fleet/", "/health")


class OnlyNodesFromOutside:
    """ASGI middleware: other hosts reach the Fleet API and the health route, this host reaches everything."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it with status 403."""
        if scope["type"] == "lifespan" or scope["path"].startswith(OPEN) or _is_local(scope):
            await self._app(scope, receive, send)
        else:
            refusal = PlainTextResponse("only the server's own host may call this\n", status_code=403)
            await refusal(scope, receive, send)


def _is_local(scope: Scope) -> bool:
    client = scope.get("client")
    if client is None:
        return False
    address = ipaddress.ip_address(client[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def main() -> None:
    """Run ``flower-superlink`` with this process's arguments behind the middleware."""
    die_with_parent()
    allow_slow_starts(in_memory_corestate, sql_corestate)
    # Flower's own hook for middleware; its enterprise package is the only other one to fill it.
    extensions.get_middleware = lambda: (Middleware(OnlyNodesFromOutside),)
    flower_superlink()


if __name__ == "__main__":
    main()
