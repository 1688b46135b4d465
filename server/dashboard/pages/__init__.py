"""The pages for people, on NiceGUI: changes are pushed, nothing is loaded from elsewhere."""

from __future__ import annotations

from fastapi import FastAPI
from nicegui import Client, ui
from nicegui import app as inner
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.dashboard.actions.operations import Operations
from server.dashboard.pages import access, layout, nodes, run, runs, start

__all__ = ["attach"]

_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<circle cx="16" cy="16" r="5" fill="#1f6f78"/>'
    '<circle cx="16" cy="16" r="11" fill="none" stroke="#1f6f78" stroke-width="2"/></svg>'
)


async def _missing(request: Request, error: Exception) -> Response:
    if request.url.path.startswith("/api/"):
        return JSONResponse({"detail": f"there is no {request.url.path}"}, status_code=404)
    with Client(ui.page(""), request=request) as client, layout.frame(request, "Not found"):
        layout.empty(
            f"There is no page {request.url.path}", "The address may be mistyped.", ("All runs", "/")
        )
    return client.build_response(request, 404)


def attach(app: FastAPI, ops: Operations) -> None:
    """Put the pages at the root of an application; NiceGUI allows one such application in a process."""
    layout.dress()
    for page in (runs, run, nodes, start, access):
        page.register(ops)
    inner.add_exception_handler(404, _missing)
    ui.run_with(
        app,
        title="fedllm",
        favicon=_ICON,
        dark=None,
        language="en-US",
        tailwind=False,
        reconnect_timeout=30.0,
        show_welcome_message=False,
    )
