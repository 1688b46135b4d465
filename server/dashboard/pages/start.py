"""A new run: from a preset or like another, with a form made from the configuration's schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside
from starlette.requests import Request

from fedllm.errors import FedllmError
from server.dashboard.actions.form import Field, fields, parse
from server.dashboard.actions.operations import Operations
from server.dashboard.door.access import Principal
from server.dashboard.pages.layout import act, empty, frame, heading, lever, page

__all__ = ["register"]

_OPEN = ("", "training")


def register(ops: Operations) -> None:
    """Serve ``/start``."""

    @page("/start")
    async def start_page(request: Request, clone: str = "") -> None:
        with frame(request, "New run") as who:
            heading(f"New run like {clone}" if clone else "New run")
            waiting = ui.label("Reading presets and settings ...").classes("soft")
            await ui.context.client.connected()
            try:
                presets = await beside(ops.launcher.presets)
                schemas = await beside(ops.launcher.schemas)
                if clone:
                    document = ops.index.run(clone).config.to_document()
            except FedllmError as error:
                waiting.delete()
                empty("This cannot be read", str(error))
                return
            waiting.delete()
            form = _Form(ops, who, schemas, clone)
            if clone:
                form.show(clone, document)
                return
            by_name = {row["name"]: f"{row['name']}: {row['shows']}" for row in presets}

            async def chosen() -> None:
                preset = choice.value
                found = await beside(ops.launcher.document, preset)
                costs.text = next(row["costs"] for row in presets if row["name"] == preset)
                form.show(preset, found)

            with form.head:
                first = "quickstart" if "quickstart" in by_name else next(iter(by_name))
                choice = ui.select(by_name, value=first, label="Preset", on_change=chosen).props("outlined")
                choice.style("max-width: 46rem; width: 100%")
                costs = ui.label().classes("soft")
            await chosen()


class _Form:
    def __init__(self, ops: Operations, who: Principal, schemas: dict[str, Any], clone: str) -> None:
        self.ops, self.who, self.schemas, self.clone = ops, who, schemas, clone
        self.source = ""
        self.inputs: list[tuple[Field, Callable[[], Any]]] = []
        self.head = ui.element("div").style("margin: 1rem 0")
        with ui.element("div").classes("row").style("margin: 1rem 0"):
            self.name = ui.input("Name of the run").props("outlined dense")
            self.button = lever("Start", self._start, who=who, style="main")
        self.body = ui.element("div")

    def show(self, source: str, document: dict[str, Any]) -> None:
        """Draw the settings of a preset, or of the run that is cloned."""
        self.source, self.inputs = source, []
        self.name.value = self._free_name(source)
        sections: dict[str, list[Field]] = {}
        for field in fields(self.schemas, document):
            sections.setdefault(field.section, []).append(field)
        self.body.clear()
        with self.body:
            for section, held in sections.items():
                with (
                    ui.expansion(section.capitalize() or "Run", value=section in _OPEN)
                    .classes("panel")
                    .style("margin-bottom: .75rem; padding: .25rem .5rem; width: 100%"),
                    ui.element("div").classes("form"),
                ):
                    self.inputs += [(field, _ask(field)) for field in held]

    def _free_name(self, wanted: str) -> str:
        taken = set(self.ops.index.names())
        numbered = (f"{wanted}-{number}" for number in range(2, len(taken) + 3))
        return next(name for name in (wanted, *numbered) if name not in taken)

    async def _start(self) -> None:
        name = self.name.value.strip()

        def begin() -> dict[str, Any]:
            given = {field.key: parse(field, value()) for field, value in self.inputs}
            settings = {key: value for key, value in given.items() if value is not None}
            start = self.ops.clone if self.clone else self._start_preset
            return start(self.who, self.source, name, settings)

        self.button.disable()
        ui.notify("Checking the configuration ...")
        if await act(begin, f"{name} starts") is not None:
            ui.navigate.to(f"/runs/{quote(name, safe='')}")
        self.button.enable()

    def _start_preset(
        self, who: Principal, preset: str, name: str, settings: dict[str, Any]
    ) -> dict[str, Any]:
        return self.ops.start(who, name, preset, settings)


def _ask(field: Field) -> Callable[[], Any]:
    """Draw the input of one setting; returns what reads it."""
    with ui.element("div"):
        if field.kind == "switch":
            switch = ui.switch(field.label, value=bool(field.value))
            read: Callable[[], Any] = lambda: switch.value  # noqa: E731
        elif field.kind == "choice":
            choice = ui.select(list(field.choices), value=field.value, label=field.label).props(
                "outlined dense"
            )
            read = lambda: choice.value  # noqa: E731
        else:
            shown = ", ".join(field.value or ()) if field.kind == "words" else field.value
            text = ui.input(field.label, value="" if shown is None else str(shown)).props("outlined dense")
            read = lambda: text.value  # noqa: E731
        if field.says:
            ui.label(field.says).classes("field-help")
    return read
