"""The dashboard put together: gate, login, API, metrics, and pages where they are wanted."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from fedllm.errors import ConfigError, FedllmError
from fedllm.terminal.console import console
from server.dashboard.actions.operations import Operations
from server.dashboard.api import router
from server.dashboard.door.access import Throttle
from server.dashboard.door.gate import COOKIE, Gate
from server.dashboard.door.login import login_page, safe_path
from server.dashboard.errors import Conflict, Denied, Missing
from server.dashboard.reading import prometheus as metrics
from server.patience import Impatient

__all__ = ["create", "serve"]

_STATUS: dict[type[FedllmError], int] = {Denied: 403, Missing: 404, Conflict: 409, ConfigError: 422}


def create(ops: Operations, *, pages: bool = False, trusted_proxies: Sequence[str] = ()) -> FastAPI:
    """Build the application.

    Args:
        ops: what it shows and does.
        pages: with the pages for people; at most one such application fits in a process.
        trusted_proxies: addresses or networks that are believed when they say, by ``X-Forwarded-For`` and
            ``X-Forwarded-Proto``, for whom and over what they pass a request on.
    """
    app = FastAPI(
        title="fedllm dashboard",
        version="1",
        summary="What the pages show and do, for scripts.",
        openapi_url="/api/openapi.json",
        # Their scripts come from a content delivery network; the description itself is served.
        docs_url=None,
        redoc_url=None,
        routes=router.routes,
    )
    app.state.ops = ops
    app.add_exception_handler(FedllmError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_api_route("/healthz", _health, include_in_schema=False)
    app.add_api_route("/metrics", _metrics, include_in_schema=False)
    app.add_route("/login", _login_form, methods=["GET"])
    app.add_route("/login", _login(ops), methods=["POST"])
    app.add_route("/logout", _logout, methods=["POST"])
    if pages:
        from server.dashboard.pages import attach

        attach(app, ops)
    app.add_middleware(Gate, accounts=ops.accounts, sessions=ops.sessions, warn=_warn)
    # The outermost: whatever stands behind it sees the browser's address and scheme.
    app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(trusted_proxies))
    return app


def _warn(sentence: str) -> None:
    console.print(sentence, style="yellow", markup=False, soft_wrap=True)


def serve(
    ops: Operations,
    *,
    host: str,
    port: int,
    certificate: Path | None = None,
    key: Path | None = None,
    trusted_proxies: Sequence[str] = (),
) -> None:
    """Serve the dashboard until Ctrl-C.

    Args:
        ops: what it shows and does.
        host: address to listen on.
        port: TCP port.
        certificate: PEM file; with ``key``, the dashboard speaks TLS.
        key: PEM file.
        trusted_proxies: see :func:`create`.
    """
    import uvicorn

    app = create(ops, pages=True, trusted_proxies=trusted_proxies)
    uvicorn.run(
        app,
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        http=Impatient,
        timeout_graceful_shutdown=2,
    )


def _health() -> Response:
    return PlainTextResponse("ok\n")


def _metrics(request: Request) -> Response:
    return Response(metrics.render(request.app.state.ops), media_type="text/plain; version=0.0.4")


async def _login_form(request: Request) -> Response:
    return login_page(200, next_path=request.query_params.get("next", "/"))


def _login(ops: Operations) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of login attempts.

    Failures count by address and user together, and, for who tries many, by address and by user alone: a
    stranger behind the same proxy or router locks nobody out by mistyping a name of his own.
    """
    pairs, addresses, users = Throttle(), Throttle(limit=50), Throttle(limit=50)

    async def login(request: Request) -> Response:
        form = await request.form(max_files=0, max_fields=8)
        # No name is as long as that; what is longer must not fill the memory.
        name, password = str(form.get("user", ""))[:65], str(form.get("password", ""))[:256]
        next_path = safe_path(str(form.get("next", "/")))
        address = request.client.host if request.client else "?"
        limits = ((pairs, f"{address} {name}"), (addresses, address), (users, name))
        wait = max(throttle.wait_s(key) for throttle, key in limits)
        if wait > 0:
            page = login_page(
                429, next_path=next_path, problem=f"Too many attempts: wait {math.ceil(wait)} seconds."
            )
            page.headers["Retry-After"] = str(math.ceil(wait))
            return page
        # Counted before the slow check, so that attempts made at the same time count too.
        for throttle, key in limits:
            throttle.failed(key)
        stamp = ops.accounts.stamp_of(name)
        role = await run_in_threadpool(ops.accounts.check_password, name, password)
        ops.login_noted(name, address, succeeded=role is not None)
        if role is None:
            return login_page(401, next_path=next_path, problem="User or password is wrong.")
        for throttle, key in limits:
            throttle.clear(key)
        answer = RedirectResponse(next_path, status_code=303)
        answer.set_cookie(
            COOKIE,
            ops.sessions.open(name, role, stamp).session,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    return login


async def _logout(request: Request) -> Response:
    request.app.state.ops.sessions.close(request.state.principal.session)
    answer = RedirectResponse("/login", status_code=303)
    answer.delete_cookie(COOKIE)
    return answer


def _refused(request: Request, error: Exception) -> Response:
    status = next((number for kind, number in _STATUS.items() if isinstance(error, kind)), 500)
    return JSONResponse({"detail": str(error)}, status_code=status)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return JSONResponse({"detail": f"{where}: {first['msg']}"}, status_code=422)
