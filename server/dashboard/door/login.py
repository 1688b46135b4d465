"""The login page and what it posts to; it needs no script, so it stands before the gate on its own."""

from __future__ import annotations

from functools import cache
from html import escape
from importlib.resources import files
from urllib.parse import urlsplit

from starlette.responses import HTMLResponse

__all__ = ["login_page", "safe_path"]


def login_page(status: int, *, next_path: str = "/", problem: str = "") -> HTMLResponse:
    """Return the login form.

    Args:
        status: of the answer.
        next_path: where to go afterwards.
        problem: one sentence about the last attempt.
    """
    told = f'<p role="alert" class="problem">{escape(problem)}</p>' if problem else ""
    page = _template().replace("{{next}}", escape(safe_path(next_path))).replace("{{problem}}", told)
    return HTMLResponse(page, status_code=status)


@cache
def _template() -> str:
    return files("server.dashboard.door").joinpath("login.html").read_text(encoding="utf-8")


def safe_path(path: str) -> str:
    """Return a path on this server, ``/`` for anything that leads elsewhere.

    >>> safe_path("/runs/a"), safe_path("//evil.example"), safe_path("https://evil.example/")
    ('/runs/a', '/', '/')
    """
    parts = urlsplit(path)
    plain = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if plain and not parts.netloc and not parts.scheme else "/"
