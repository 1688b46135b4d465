"""What all pages have in common: header, colours, and how an action tells what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import TypeVar

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement
from starlette.concurrency import run_in_threadpool as beside
from starlette.requests import Request

from fedllm.errors import FedllmError
from server.dashboard.actions.operations import Operations
from server.dashboard.door.access import Principal

__all__ = [
    "TICK_S",
    "act",
    "chip",
    "dress",
    "empty",
    "frame",
    "heading",
    "lever",
    "on_top",
    "page",
    "principal",
    "sure",
    "watch",
]

TICK_S = 1.0
"""Seconds between two looks at the run store."""
Result = TypeVar("Result")
_LINKS = (("Runs", "/"), ("New run", "/start"), ("Nodes", "/nodes"), ("Access", "/access"))


# A page that lost its connection for good, since the dashboard was started anew, would stand still for ever.
_SIGN_IN = """<script>
function signIn() {
  location.href = "/login?next=" + encodeURIComponent(location.pathname + location.search);
}
setInterval(async () => {
  if (!window.socket || window.socket.connected) return;
  try { if ((await fetch("/api/session")).status === 401) signIn(); } catch { /* it is still away */ }
}, 3000);
</script>"""


def page(path: str) -> ui.page:
    """Serve a page; a run of thousands of nodes may take its time on a busy host."""
    return ui.page(path, response_timeout=60.0)


def dress() -> None:
    """Give every page the style sheet."""
    style = files("server.dashboard.pages").joinpath("style.css").read_text(encoding="utf-8")
    ui.add_css(style, shared=True)
    ui.add_head_html('<meta name="color-scheme" content="light dark">', shared=True)
    ui.add_head_html(_SIGN_IN, shared=True)


def principal(request: Request) -> Principal:
    """Return who looks at a page; the gate let nobody else in."""
    found: Principal = request.state.principal
    return found


@contextmanager
def frame(request: Request, title: str) -> Iterator[Principal]:
    """Draw the header, and the block's content below it; yields who looks."""
    who = principal(request)
    ui.page_title(f"{title} - fedllm")
    ui.colors(primary="#1f6f78", positive="#1d7a46", negative="#b3261e", warning="#9a5b00")
    ui.link("Skip to content", "#content").classes("skip")
    with ui.element("header").classes("bar"):
        ui.link("fedllm", "/").classes("brand")
        with ui.element("nav").props('aria-label="Main"'):
            for text, path in _LINKS:
                if path == "/access" and who.role != "operator":
                    continue
                link = ui.link(text, path)
                if request.url.path == path:
                    link.props('aria-current="page"')
                elif path == "/" and request.url.path.startswith("/runs/"):
                    link.props('aria-current="true"')
        ui.label(f"{who.name} ({who.role})").classes("who")
        with ui.element("form").props('method="post" action="/logout"'):
            _text("button", "Log out").props('type="submit"').classes("quiet")
    # Quasar's page is the <main> around it.
    with ui.element("div").classes("content").props('id="content" tabindex="-1"'):
        yield who


class _Text(TextElement):
    def __init__(self, tag: str, text: str) -> None:
        super().__init__(tag=tag, text=text)


def _text(tag: str, text: str) -> _Text:
    return _Text(tag, text)


def heading(text: str, level: int = 1) -> _Text:
    """Draw a heading."""
    return _text(f"h{level}", text)


def chip(state: str) -> _Text:
    """Draw a state, such as running or failed."""
    return _text("span", state).classes("chip").props(f'data-state="{state}"')


def lever(text: str, work: Callable[[], object], *, who: Principal, style: str = "") -> ui.button:
    """Draw a button that changes something; viewers see it and cannot press it."""
    button = ui.button(text, on_click=work, color=None).props("no-caps unelevated").classes(f"lever {style}")
    if who.role != "operator":
        button.disable()
        button.tooltip("this needs the role operator")
    return button


def empty(headline: str, advice: str, link: tuple[str, str] | None = None) -> None:
    """Say that there is nothing to see, and what to do about it.

    Args:
        headline: what there is not.
        advice: one sentence.
        link: where there is nothing else on the page: a text, and where it leads.
    """
    with ui.element("div").classes("panel empty"):
        heading(headline, 1 if link else 2)
        ui.label(advice).classes("soft")
        if link:
            ui.link(*link)


async def act(work: Callable[[], Result], said: str) -> Result | None:
    """Do something beside the event loop, and tell what became of it; returns None where it was refused."""
    try:
        result = await beside(work)
    except FedllmError as error:
        ui.notify(str(error), type="negative", multi_line=True, close_button="OK", timeout=10_000)
        return None
    ui.notify(said, type="positive")
    return result


async def sure(question: str, yes: str, no: str) -> bool:
    """Ask before what cannot be taken back."""
    with on_top() as dialog, ui.card():
        ui.label(question)
        with ui.element("div").classes("row"):
            ui.button(yes, on_click=lambda: dialog.submit(True), color="negative").props("no-caps")
            ui.button(no, on_click=lambda: dialog.submit(False)).props("flat no-caps")
    try:
        return bool(await dialog)
    finally:
        dialog.delete()


@contextmanager
def on_top() -> Iterator[ui.dialog]:
    """A dialog of the page itself: one made inside the button's own panel goes when that panel is redrawn."""
    with ui.context.client.content, ui.dialog() as dialog:
        yield dialog


def watch(ops: Operations, who: Principal, look: Callable[[], object]) -> None:
    """Call ``look`` every tick while somebody has the page open and is logged in; say what it cannot see."""
    said = ""

    async def tick() -> None:
        nonlocal said
        if not ops.goes_on(who, touch=False):
            ui.run_javascript("signIn()")
            return
        try:
            outcome = look()
            if hasattr(outcome, "__await__"):
                await outcome
            said = ""
        except FedllmError as error:
            if str(error) != said:
                said = str(error)
                ui.notify(f"This page stands still: {error}", type="warning", timeout=0, close_button="OK")

    ui.timer(TICK_S, tick)
