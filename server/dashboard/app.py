"""The dashboard put together: gate, login, API, metrics, and pages where they are wanted."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from fedllm.errors import ConfigError, FedllmError
from server.dashboard import metrics
from server.dashboard.access import Throttle
from server.dashboard.api import router
from server.dashboard.desk import Desk
from server.dashboard.errors import Conflict, Denied, Missing
from server.dashboard.gate import COOKIE, Gate
from server.dashboard.login import login_page, safe_path

__all__ = ["create", "serve"]

_STATUS: dict[type[FedllmError], int] = {Denied: 403, Missing: 404, Conflict: 409, ConfigError: 422}


def create(desk: Desk, *, tls: bool = False, pages: bool = False) -> FastAPI:
    """Build the application.

    Args:
        desk: what it shows and does.
        tls: whether it will be served by TLS: cookies are then sent that way only.
        pages: with the pages for people; at most one such application fits in a process.
    """
    app = FastAPI(
        title="fedllm dashboard",
        version="1",
        summary="What the pages show and do, for scripts.",
        openapi_url="/api/openapi.json",
        # Their scripts come from a content delivery network; the description itself is served.
        docs_url=None,
        redoc_url=None,
    )
    app.state.desk = desk
    app.include_router(router)
    app.add_exception_handler(FedllmError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_api_route("/healthz", _health, include_in_schema=False)
    app.add_api_route("/metrics", _metrics, include_in_schema=False)
    app.add_route("/login", _login_form, methods=["GET"])
    app.add_route("/login", _login(desk, Throttle(), Throttle(limit=50), tls=tls), methods=["POST"])
    app.add_route("/logout", _logout, methods=["POST"])
    if pages:
        from server.dashboard.pages import attach

        attach(app, desk)
    app.add_middleware(Gate, accounts=desk.accounts, sessions=desk.sessions, tls=tls)
    return app


def serve(
    desk: Desk,
    *,
    host: str,
    port: int,
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve the dashboard until Ctrl-C.

    Args:
        desk: what it shows and does.
        host: address to listen on.
        port: TCP port.
        certificate: PEM file; with ``key``, the dashboard speaks TLS.
        key: PEM file.
    """
    import uvicorn

    app = create(desk, tls=certificate is not None, pages=True)
    uvicorn.run(
        app,
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )


def _health() -> Response:
    return PlainTextResponse("ok\n")


def _metrics(request: Request) -> Response:
    return Response(metrics.render(request.app.state.desk), media_type="text/plain; version=0.0.4")


async def _login_form(request: Request) -> Response:
    return login_page(200, next_path=request.query_params.get("next", "/"))


def _login(
    desk: Desk, one: Throttle, everybody: Throttle, *, tls: bool
) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of login attempts; failures count by address, and by user over all addresses."""

    async def login(request: Request) -> Response:
        form = await request.form(max_files=0, max_fields=8)
        # No name is as long as that; what is longer must not fill the memory.
        name, password = str(form.get("user", ""))[:65], str(form.get("password", ""))[:256]
        next_path = safe_path(str(form.get("next", "/")))
        address = request.client.host if request.client else "?"
        wait = max(one.wait_s(address), everybody.wait_s(name))
        if wait > 0:
            page = login_page(
                429, next_path=next_path, problem=f"Too many attempts: wait {math.ceil(wait)} seconds."
            )
            page.headers["Retry-After"] = str(math.ceil(wait))
            return page
        # Counted before the slow check, so that attempts made at the same time count too.
        one.failed(address)
        everybody.failed(name)
        stamp = desk.accounts.stamp_of(name)
        role = await run_in_threadpool(desk.accounts.check_password, name, password)
        desk.login_noted(name, address, succeeded=role is not None)
        if role is None:
            return login_page(401, next_path=next_path, problem="User or password is wrong.")
        one.clear(address)
        everybody.clear(name)
        answer = RedirectResponse(next_path, status_code=303)
        answer.set_cookie(
            COOKIE,
            desk.sessions.open(name, role, stamp).session,
            httponly=True,
            samesite="strict",
            secure=tls,
        )
        return answer

    return login


async def _logout(request: Request) -> Response:
    request.app.state.desk.sessions.close(request.state.principal.session)
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
