"""The one place that lets a request in, or does not: whatever stands behind it is asked only afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedllm.errors import StoreError
from fedllm.terminal.console import console
from server.dashboard.door.access import Accounts, Principal, Sessions
from server.dashboard.door.login import login_page

__all__ = ["COOKIE", "Gate"]

COOKIE = "fedllm_session"
OPEN = ("/healthz", "/login")
SAFE = ("GET", "HEAD", "OPTIONS")
LARGEST_BODY = 1_000_000
_POLICY = (
    "default-src 'self'; "
    # NiceGUI compiles its Vue templates in the browser.
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


class Gate:
    """ASGI middleware: authentication, roles, CSRF and security headers, for HTTP and websockets alike.

    Args:
        app: what stands behind.
        accounts: users and tokens.
        sessions: logins.
        warn: called once with a sentence where a proxy stands before the dashboard and is not trusted.
    """

    def __init__(
        self, app: ASGIApp, accounts: Accounts, sessions: Sessions, *, warn: Callable[[str], None]
    ) -> None:
        self._app, self._accounts, self._sessions = app, accounts, sessions
        self._warn, self._warned = warn, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its principal in ``scope["state"]``, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        self._look_for_proxy(scope, headers)
        principal: Principal | None = None
        refusal: Response | None
        try:
            principal = self._authenticate(headers)
        except StoreError as error:
            console.print(str(error), style="red")
            refusal = _problem(503, "who may enter cannot be read: see the dashboard's terminal")
        else:
            refusal = self._refuse(scope, headers, principal)
        scope.setdefault("state", {})["principal"] = principal
        if scope["type"] == "websocket":
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                _secure(MutableHeaders(scope=message), scope["path"], tls=scope["scheme"] == "https")
            await send(message)

        await (refusal or self._app)(scope, receive, guarded)

    def _look_for_proxy(self, scope: Scope, headers: Headers) -> None:
        """Say once that requests come through a proxy that nobody has named."""
        client = scope.get("client")
        # Of a trusted proxy's request the address is the browser's by now.
        if self._warned or client is None or "x-forwarded-for" not in headers:
            return
        if client[0] not in headers["x-forwarded-for"]:
            self._warned = True
            self._warn(
                f"requests come through a proxy at {client[0]}: start with --trusted-proxy {client[0]}, or "
                "all who sign in share one limit of attempts, and cookies are not kept to TLS"
            )

    def _authenticate(self, headers: Headers) -> Principal | None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self._accounts.check_token(token.strip())
        found = self._sessions.find(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""))
        # A user who was removed or changed has no rights left, whatever the session says.
        return found if found and self._accounts.stamp_of(found.name) == found.stamp else None

    def _refuse(self, scope: Scope, headers: Headers, principal: Principal | None) -> Response | None:
        path, websocket = scope["path"], scope["type"] == "websocket"
        unsafe = websocket or scope["method"] not in SAFE
        if unsafe and not _same_origin(headers):
            return _problem(403, "this request comes from another site")
        if not headers.get("content-length", "0").isdecimal() or "transfer-encoding" in headers:
            return _problem(411, "say how long the body is")
        if int(headers.get("content-length", "0")) > LARGEST_BODY:
            return _problem(413, f"the body may have {LARGEST_BODY} bytes")
        if path in OPEN and not websocket:
            return None
        # Pages stay open for as long as their session; a token has none that could end.
        if principal is None or (websocket and not principal.session):
            return _unknown(path, headers)
        if unsafe and path.startswith("/api/"):
            if principal.session and not secrets.compare_digest(
                headers.get("x-csrf-token", "").encode(), principal.csrf.encode()
            ):
                return _problem(403, "X-CSRF-Token is missing or wrong; GET /api/session tells it")
            if principal.role != "operator":
                return _problem(403, f"{principal.name} may look, not change: this needs the role operator")
        return None


def _secure(headers: MutableHeaders, path: str, *, tls: bool) -> None:
    headers.setdefault("Content-Security-Policy", _POLICY)
    headers["X-Content-Type-Options"] = "nosniff"
    headers["X-Frame-Options"] = "DENY"
    headers["Referrer-Policy"] = "same-origin"
    headers["Cross-Origin-Opener-Policy"] = "same-origin"
    headers["Permissions-Policy"] = "camera=(), geolocation=(), microphone=()"
    if not path.startswith("/_nicegui/"):
        headers["Cache-Control"] = "no-store"
    if tls:
        headers["Strict-Transport-Security"] = "max-age=31536000"


def _same_origin(headers: Headers) -> bool:
    """Whether the request was made by our own page, or by no page at all."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _unknown(path: str, headers: Headers) -> Response:
    if path.startswith(("/api/", "/metrics")) or "text/html" not in headers.get("accept", ""):
        return _problem(401, "log in at /login, or send Authorization: Bearer TOKEN")
    return login_page(401, next_path=path)


def _problem(status: int, sentence: str) -> Response:
    return JSONResponse({"detail": sentence}, status_code=status)
