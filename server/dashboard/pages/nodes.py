"""Nodes: of the federation that is served beside, and of any one run."""

from __future__ import annotations

from nicegui import ui
from starlette.concurrency import run_in_threadpool as beside
from starlette.requests import Request

from server.dashboard.actions.federation import FederationNode
from server.dashboard.actions.operations import Operations
from server.dashboard.door.access import Principal
from server.dashboard.pages.layout import act, chip, empty, frame, heading, lever, page, sure, watch
from server.dashboard.pages.node_table import NodeTable

__all__ = ["register"]


def register(ops: Operations) -> None:
    """Serve ``/nodes``."""

    @page("/nodes")
    async def nodes_page(request: Request, run_name: str = "") -> None:
        views = await beside(ops.index.overviews)
        with frame(request, "Nodes") as who:
            heading("Nodes")
            if ops.federation is not None:
                await _draw_federation(ops, who)
            readable = [view.name for view in views if view.method]
            if not readable:
                empty("No run has met a node yet", "Nodes show here once a run has asked them something.")
                return
            chosen = run_name if run_name in readable else readable[0]
            with ui.element("div").classes("row").style("margin: 1rem 0"):
                ui.select(
                    readable,
                    value=chosen,
                    label="In the run",
                    with_input=True,
                    on_change=lambda event: ui.navigate.to(f"/nodes?run_name={event.value}"),
                ).props("dense outlined")
                known = next(view for view in views if view.name == chosen)
                ui.label(f"{known.method} on {known.model}").classes("soft")
            table = NodeTable(ops, who, chosen, leave_out=("loss", "transfer", "moved"))

            async def look() -> None:
                live = (await beside(ops.index.overview, chosen)).live
                table.show(await beside(ops.index.nodes, chosen), live=live)

            await look()
            watch(ops, who, look)


async def _draw_federation(ops: Operations, who: Principal) -> None:
    panel = ui.element("div").classes("panel").style("margin-top: 1rem")
    shown: list[FederationNode] = []

    async def look() -> None:
        found = await beside(ops.federation_nodes)
        if found == shown:
            return
        shown[:] = found
        panel.clear()
        with panel:
            heading("Of this federation", 2)
            for node in found:
                _draw_node(ops, who, node)

    await look()
    watch(ops, who, look)


def _draw_node(ops: Operations, who: Principal, node: FederationNode) -> None:
    async def revoke() -> None:
        if await sure(f"Forbid node {node.node} to join, for ever?", "Revoke", "Keep"):
            await act(lambda: ops.revoke(who, node.node), f"node {node.node} may not join any more")

    with ui.element("div").classes("row apart"):
        with ui.element("div").classes("row"):
            ui.label(f"node {node.node}").classes("name")
            chip(node.status)
            ui.label(f"key {node.fingerprint}").classes("soft number wide")
        if node.status != "revoked":
            lever("Revoke", revoke, who=who, style="danger")
