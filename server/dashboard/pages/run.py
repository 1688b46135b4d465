"""One run, live: the three answers, its curves, its nodes, its log, and the levers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args
from urllib.parse import quote

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside
from starlette.requests import Request

from fedllm.runs.summary import best_of, fairness_of, fairness_sentence
from fedllm.runs.totals import NodeTotal
from fedllm.wording import human_seconds, number
from server.dashboard.actions.downloads import File, lacking
from server.dashboard.actions.operations import Operations
from server.dashboard.door.access import Principal
from server.dashboard.errors import Missing
from server.dashboard.pages import charts
from server.dashboard.pages.answers import Answers
from server.dashboard.pages.layout import act, chip, empty, frame, heading, lever, page, sure, watch
from server.dashboard.pages.logs import Logs, audit_line
from server.dashboard.pages.node_table import NodeTable
from server.dashboard.reading import verdict
from server.dashboard.reading.runs import Overview
from server.dashboard.reading.verdict import Verdict

__all__ = ["register"]


def register(ops: Operations) -> None:
    """Serve ``/runs/NAME``."""

    @page("/runs/{name}")
    async def run_page(request: Request, name: str) -> None:
        with frame(request, name) as who:
            try:
                view = await beside(ops.overview, name)
            except Missing:
                empty(f"There is no run {name}", "It may have been renamed or deleted.", ("All runs", "/"))
                return
            if view.state in ("starting", "unreadable") or not view.method:
                _before(ops, who, view)
                return
            page = _RunPage(ops, who, name)
            await page.look()
            # The page is painted before the browser loads the chart library.
            await ui.context.client.connected()
            page.draw_charts()
            watch(ops, who, page.look)


def _before(ops: Operations, who: Principal, view: Overview) -> None:
    """Show a run that has no records yet, or none that can be read."""

    async def dismiss() -> None:
        await act(lambda: ops.dismiss(who, view.name), f"{view.name} is dismissed")
        ui.navigate.to("/")

    with ui.element("div").classes("row apart"):
        with ui.element("div").classes("row"):
            heading(view.name)
            chip(view.state)
        if view.state == "failed":
            lever("Dismiss", dismiss, who=who)
    if view.reason:
        empty("It did not start" if view.state == "failed" else "It cannot be read", view.reason)
    else:
        empty("Starting", "Model and data are being loaded; this page goes on by itself.")
    output = ui.label(ops.launcher.log(view.name)).classes("log panel")

    def look() -> None:
        output.text = ops.launcher.log(view.name)
        if ops.overview(view.name).state != view.state:
            ui.navigate.reload()

    watch(ops, who, look)


class _Answer:
    """A card with one of the three answers."""

    def __init__(self, question: str) -> None:
        with ui.element("section").classes("panel verdict") as self.card:
            ui.label(question).classes("question")
            self.headline = ui.label().classes("headline").props('role="status"')
            self.detail = ui.label().classes("detail")

    def show(self, answer: Verdict) -> None:
        self.card.props(f'data-tone="{answer.tone}"')
        self.headline.text, self.detail.text = answer.headline, answer.detail


class _RunPage:
    def __init__(self, ops: Operations, who: Principal, name: str) -> None:
        self.ops, self.who, self.name = ops, who, name
        self.config = ops.index.run(name).config
        self.stamp: object = None
        self.records_stamp: object = None
        self.state = ""
        with ui.element("div").classes("row apart"):
            with ui.element("div").classes("row"):
                heading(name)
                self.chip = chip("")
                self.doing = ui.label().classes("soft")
            self.levers = ui.element("div").classes("row")
        with ui.element("div").classes("row"):
            with ui.element("div").classes("progress").props('aria-hidden="true"').style("flex: 1"):
                self.bar = ui.element("i")
            self.count = ui.label().classes("soft number")
        with ui.element("div").classes("cards"):
            self.answers = [
                _Answer(question) for question in ("Is it running well?", "Who is slow?", "What did it cost?")
            ]
        self.charts = ui.element("div").classes("charts")
        self.charted = False
        self._draw_tabs()

    def draw_charts(self) -> None:
        """Draw the curves."""
        with self.charts:
            with ui.element("section").classes("panel"):
                with ui.element("div").classes("row apart"):
                    heading("Quality", 2)
                    with ui.element("div").classes("row"):
                        self.metric = _choice(self._draw_curves, "Metric")
                        self.axis = _choice(self._draw_curves, "Against")
                self.quality = ui.echart({}).classes("chart")
            with ui.element("section").classes("panel"):
                with ui.element("div").classes("row apart"):
                    heading("Traffic by round", 2)
                    self.unit = _choice(self._draw_curves, "As")
                self.traffic = ui.echart({}).classes("chart")
            with ui.element("section").classes("panel") as self.facts_panel:
                with ui.element("div").classes("row apart"):
                    heading("Method", 2)
                    self.fact = _choice(self._draw_curves, "Fact")
                self.facts = ui.echart({}).classes("chart")
        self.charted = True
        self._draw_curves()

    def _draw_tabs(self) -> None:
        names = ("Nodes", "Answers", "Log", "Configuration", "Checkpoints", "Audit")
        with ui.tabs().props("align=left no-caps dense outside-arrows mobile-arrows") as tabs:
            for name in names:
                ui.tab(name)
        with ui.tab_panels(tabs, value="Nodes").props("keep-alive"):
            with ui.tab_panel("Nodes"):
                self.fairness = ui.label().classes("soft")
                self.nodes = NodeTable(self.ops, self.who, self.name, leave_out=("device",))
            with ui.tab_panel("Answers"):
                self.rounds = Answers(self.ops, self.name)
            with ui.tab_panel("Log"), ui.element("div").classes("panel"):
                self.logs = Logs(self.ops, self.name)
            with ui.tab_panel("Configuration"), ui.element("div").classes("panel"):
                ui.label(self.config.to_toml()).classes("log")
            with ui.tab_panel("Checkpoints"):
                self.checkpoints = ui.element("div").classes("panel")
            with ui.tab_panel("Audit"), ui.element("div").classes("panel"):
                self.audit = ui.label().classes("log")

    async def look(self) -> None:
        """Show what has changed since the last look."""
        # The stamps first: what changes while the rest is read is then seen at the next look.
        stamp = await beside(self.ops.index.stamp, self.name)
        view = await beside(self.ops.overview, self.name)
        if not view.rounds:
            # Begun anew, or damaged meanwhile: there is another page for that.
            ui.navigate.reload()
            return
        records_stamp = await beside(self.ops.index.records_stamp, self.name)
        nodes = await beside(self.ops.index.nodes, self.name)
        self._show_head(view, nodes)
        if stamp == self.stamp:
            return
        self.stamp = stamp
        await self.logs.look()
        await self._show_audit()
        records = (records_stamp, view.live)
        if records == self.records_stamp:
            return
        self.records_stamp = records
        self.answers[1].show(verdict.slow(nodes))
        self.nodes.show(nodes, live=view.live)
        await self._show_rounds()

    def _show_head(self, view: Overview, nodes: list[NodeTotal]) -> None:
        self.answers[0].show(verdict.health(view, nodes))
        self.answers[2].show(verdict.cost(view))
        self.count.text = f"round {view.round} of {view.rounds}"
        if view.value is not None:
            self.count.text += f", {view.metric} {number(view.value)}"
        if view.best is not None:
            self.count.text += f" (best {number(view.best)} in round {view.best_round})"
        if view.seconds_left is not None:
            self.count.text += f", about {human_seconds(view.seconds_left)} left"
        self.doing.text = "".join(f"{kind} asked for, " for kind in view.pending) + verdict.terms(
            view, self.config.quorum, self.config.server.deadline_s
        )
        self.logs.look_at_server()
        self.bar.style(f"width: {100 * view.round / view.rounds:.1f}%")
        if view.state != self.state:
            self.state = view.state
            self.chip.text = view.state
            self.chip.props(f'data-state="{view.state}"')
            self.levers.clear()
            with self.levers:
                self._draw_levers(view)

    async def _show_rounds(self) -> None:
        self.records = await beside(self.ops.index.rounds, self.name)
        self.moved = await beside(self.ops.index.traffic, self.name)
        # A round that ended the run was not committed, and is what one wants to see.
        asked = {row.round for row in self.moved} | {record.round for record in self.records}
        self.rounds.offer(sorted(asked))
        fairness = fairness_of(self.records)
        self.fairness.set_visibility(fairness is not None)
        if fairness is not None:
            self.fairness.text = fairness_sentence(fairness, self.config.metric)
        self._draw_curves()
        held = await beside(self.ops.checkpoints, self.name)
        self.checkpoints.clear()
        with self.checkpoints:
            found = best_of(((record.round, record.metrics) for record in self.records), self.config.metric)
            self._draw_checkpoints(held, found and found.round)

    def _draw_curves(self) -> None:
        if not self.charted:
            return
        _offer(self.axis, list(charts.axes(self.records)))
        _offer(self.metric, charts.metric_names(self.records, self.config.metric))
        _offer(self.fact, charts.fact_names(self.records))
        self.facts_panel.set_visibility(bool(self.fact.options))
        self.metric.set_visibility(bool(self.metric.options))
        if self.metric.value:
            _redraw(self.quality, charts.quality(self.records, self.metric.value, self.axis.value))
        else:
            _redraw(self.quality, charts.nothing("Nothing has been measured yet"))
        _offer(self.unit, list(charts.UNITS))
        drawn = charts.traffic if self.unit.value == "bytes" else charts.compression
        _redraw(self.traffic, drawn(self.moved))
        if self.fact.value:
            _redraw(self.facts, charts.facts(self.records, self.fact.value))

    async def _show_audit(self) -> None:
        noted = await beside(self.ops.index.run(self.name).audit_log)
        self.audit.text = "\n".join(map(audit_line, noted)) or "Nobody has changed anything."

    # --- levers -----------------------------------------------------------------------------------------

    def _draw_levers(self, view: Overview) -> None:
        ask, who = self._ask, self.who
        if view.state == "running":
            lever("Pause", ask("pause"), who=who)
        if view.state == "paused":
            lever("Resume", ask("resume"), who=who, style="main")
        if view.live:
            lever("Stop", self._confirm_stop, who=who, style="danger")
        elif view.state != "finished":
            lever("Resume", self._go_on, who=who, style="main")
        lever("Clone", lambda: ui.navigate.to(f"/start?clone={quote(self.name, safe='')}"), who=who)
        with ui.button("Download", color=None).props("no-caps unelevated").classes("lever"), ui.menu():
            for file in get_args(File):
                self._draw_download(file)

    def _draw_download(self, file: File) -> None:
        path = f"/api/runs/{quote(self.name, safe='')}/files/{file}"

        async def fetch() -> None:
            if why := await beside(lacking, self.ops, self.name, file):
                ui.notify(why, type="warning")
            else:
                ui.download(path)

        ui.menu_item(file, on_click=fetch)

    def _ask(self, kind: str) -> Callable[[], Any]:
        async def ask() -> None:
            said = f"{kind}: takes effect before the next round"
            await act(lambda: self.ops.command(self.who, self.name, kind), said)

        return ask

    async def _go_on(self) -> None:
        await act(lambda: self.ops.go_on(self.who, self.name), "It goes on at its last checkpoint")

    async def _confirm_stop(self) -> None:
        if await sure("Stop after this round? It can be resumed later.", "Stop", "Keep running"):
            await self._ask("stop")()

    def _draw_checkpoints(self, held: list[int], best: int | None) -> None:
        if not held:
            ui.label("There is no checkpoint yet; one is written after every round.").classes("soft")
        for number_ in reversed(held):
            with ui.element("div").classes("row apart"):
                ui.label(f"after round {number_}" + (", the best" if number_ == best else ""))
                path = f"/api/runs/{quote(self.name, safe='')}/files/adapter.zip?round={number_}"
                ui.link("adapter.zip", path).props("download")
                lever("Go on from here", self._roll_back(number_), who=self.who)

    def _roll_back(self, round: int) -> Callable[[], Any]:
        async def roll_back() -> None:
            question = f"Go on after round {round}? Later rounds of {self.name} are forgotten."
            if round < self.records[-1].round - 1:
                question += (
                    " Clients keep what is their own of the last two rounds only: where the method or the "
                    "codec has them keep any, they begin it afresh, and other numbers come out."
                )
            if round < self.records[-1].round and not await sure(question, "Go back", "Keep them"):
                return
            said = f"It goes on after round {round}; later rounds are forgotten"
            await act(lambda: self.ops.go_on(self.who, self.name, round), said)

        return roll_back


def _choice(changed: Callable[[], None], label: str) -> ui.select:
    return ui.select([], on_change=changed, label=label).props("dense outlined options-dense")


def _offer(choice: ui.select, options: list[str]) -> None:
    if options != choice.options:
        value = choice.value if choice.value in options else (options[0] if options else None)
        choice.set_options(options, value=value)


def _redraw(chart: ui.echart, options: dict[str, Any]) -> None:
    if chart.options != options:
        chart.options.clear()
        chart.options.update(options)
        chart.update()
