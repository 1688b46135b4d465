"""Request bodies are bounded before they are read, by who sends them, and must arrive within a time.

Flower reads a body whole before it looks at who sent it. Here the caller's signature, which stands in the
headers, is looked at first: a node that may join gets as much as a piece of its reply takes, anybody else
what an introduction takes.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["MEMBER", "STRANGER", "Allowance", "BoundedBodies", "signer"]


class Allowance(NamedTuple):
    """How large a body may be, and in how many seconds it must have arrived."""

    most: int
    seconds: float


MEMBER = Allowance(16 << 20, 300.0)
"""Of whoever may join, and of this host: Flower sends tensors in pieces of 5 MB, bundles of at most 10."""
STRANGER = Allowance(64 << 10, 10.0)
"""Of anybody else."""


class BoundedBodies:
    """ASGI middleware: reads each body up to its allowance and hands it on whole.

    Args:
        app: what is behind it.
        allowance: decides for a request, by its headers alone.
        refused: called with a request whose body was too large or too slow.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowance: Callable[[Scope], Allowance],
        refused: Callable[[Scope], None] = lambda scope: None,
    ) -> None:
        self._app, self._allowance, self._refused = app, allowance, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it with status 413 (too large) or 408 (too slow)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, seconds = await run_in_threadpool(self._allowance, scope)
        try:
            declared = int(Headers(scope=scope).get("content-length", "0"))
            body = None if declared > most else await asyncio.wait_for(_read(receive, most), seconds)
        except TimeoutError:
            refusal = PlainTextResponse(f"the body did not arrive within {seconds:.0f} s\n", 408, _CLOSE)
        except ValueError:
            refusal = PlainTextResponse("content-length is not a number\n", 400, _CLOSE)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
                return
            refusal = PlainTextResponse(f"a body of this caller has at most {most} bytes\n", 413, _CLOSE)
        await run_in_threadpool(self._refused, scope)
        await refusal(scope, receive, send)


def signer(scope: Scope) -> bytes | None:
    """Return the public key that signed a request's headers a moment ago; None if none did."""
    headers = Headers(scope=scope)
    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        signed = headers[TIMESTAMP_HEADER]
        age = (now() - datetime.fromisoformat(signed)).total_seconds()
        recent = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
        if recent and verify_signature(bytes_to_public_key(key), signed.encode("ascii"), signature):
            return key
    except (KeyError, ValueError, TypeError):
        pass  # what cannot be read signs nothing
    return None


_CLOSE = {"connection": "close"}
"""What is left of a refused body is not read either."""


async def _read(receive: Receive, most: int) -> bytes | None:
    """Read a body; None where it is longer than ``most``."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            return None
        parts.append(part)
        more = message["type"] == "http.request" and message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand out a body that was read, then whatever else comes."""
    held: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return held.pop() if held else await receive()

    return again
