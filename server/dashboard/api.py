"""Everything that the pages do, as JSON; described by OpenAPI at ``/api/openapi.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from fedllm.runs.records import Event, NodeLog, NodeRound, RoundRecord
from fedllm.runs.totals import NodeTotal
from server.dashboard.actions import downloads
from server.dashboard.actions.federation import FederationNode
from server.dashboard.actions.operations import Operations
from server.dashboard.api_types import (
    Accepted,
    Clone,
    GoOn,
    Named,
    Order,
    Preset,
    Problem,
    Secret,
    Session,
    Start,
    Users,
)
from server.dashboard.door.access import Principal
from server.dashboard.reading.runs import Overview

__all__ = ["router"]

Row = TypeVar("Row")


_WHY = {
    401: "neither a login nor a token",
    403: "not with this role, or without the CSRF token",
    404: "there is no such run, node, preset or file",
    409: "not in the state that things are in",
    411: "a body without its length",
    413: "the body is too large",
    422: "a value is wrong; says which and what is allowed",
}
router = APIRouter(
    prefix="/api",
    responses={status: {"model": Problem, "description": why} for status, why in _WHY.items()},
)


def _ops(request: Request) -> Operations:
    ops: Operations = request.app.state.ops
    return ops


def _who(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


class Page:
    """A part of a long list; where there is more, the answer's ``Link`` header leads to the next part."""

    def __init__(
        self,
        request: Request,
        response: Response,
        limit: Annotated[int, Query(ge=1, le=10_000, description="Rows at most.")] = 1000,
        cursor: Annotated[
            int, Query(ge=0, le=2**62, description="Where to go on: from the Link header of the part before.")
        ] = 0,
    ) -> None:
        self.limit, self.cursor = limit, cursor
        self._request, self._response = request, response

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """Cut the page out of all rows."""
        return self.cut(rows[self.cursor : self.cursor + self.limit + 1])

    def cut(self, rows: Sequence[Row]) -> list[Row]:
        """Leave out the row beyond the page, which tells that there is more."""
        if len(rows) > self.limit:
            following = self._request.url.include_query_params(cursor=self.cursor + self.limit)
            self._response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
        return list(rows[: self.limit])


TheOperations = Annotated[Operations, Depends(_ops)]
ThePage = Annotated[Page, Depends()]
Who = Annotated[Principal, Depends(_who)]
Name = Annotated[str, Path(description="Of the run.", max_length=200)]
Number = Annotated[int, Path(ge=0, le=2**31)]
RoundQuery = Annotated[int | None, Query(ge=0, le=2**31, description="Only this round.")]
NodeQuery = Annotated[int | None, Query(ge=0, le=2**31, description="Only this node.")]


@router.get("/session")
def session(who: Who) -> Session:
    """Who am I, and what do I send with a change?"""
    return Session(name=who.name, role=who.role, csrf=who.csrf)


@router.get("/runs")
def runs(
    ops: TheOperations,
    page: ThePage,
    state: Annotated[str | None, Query(description="Only runs in this state.")] = None,
    method: Annotated[str | None, Query(description="Only runs of this method.")] = None,
) -> list[Overview]:
    """List the runs: live ones first, then the latest change first."""
    return page.of(
        [
            view
            for view in ops.overviews()
            if (state is None or view.state == state) and (method is None or view.method == method)
        ]
    )


@router.post("/runs", status_code=202)
def start(ops: TheOperations, who: Who, body: Start) -> Accepted:
    """Start a run from a preset, in a process of its own."""
    ops.start(who, body.name, body.preset, body.settings)
    return Accepted(name=body.name)


@router.get("/runs/{name}")
def run(ops: TheOperations, name: Name) -> Overview:
    """One run at a glance."""
    return ops.overview(name)


@router.get("/runs/{name}/rounds")
def rounds(
    ops: TheOperations, page: ThePage, name: Name, after: Annotated[int, Query(ge=-1, le=2**31)] = -1
) -> list[RoundRecord]:
    """Committed rounds, ascending; round 0 is the setup."""
    return page.of([record for record in ops.index.rounds(name) if record.round > after])


@router.get("/runs/{name}/nodes")
def nodes(ops: TheOperations, page: ThePage, name: Name) -> list[NodeTotal]:
    """Clients over the whole run, by number."""
    return page.of(ops.index.nodes(name))


@router.get("/runs/{name}/answers")
def answers(
    ops: TheOperations, page: ThePage, name: Name, round: RoundQuery = None, node: NodeQuery = None
) -> list[NodeRound]:
    """What became of each client in each exchange; of one round, one node, or all."""
    stored = ops.index.run(name)
    return page.cut(stored.nodes(round=round, node=node, limit=page.limit + 1, offset=page.cursor))


@router.get("/runs/{name}/traffic")
def traffic(
    ops: TheOperations,
    page: ThePage,
    name: Name,
    by: Annotated[list[Literal["round", "node", "direction", "exchange", "record"]] | None, Query()] = None,
    round: RoundQuery = None,
    node: NodeQuery = None,
) -> list[dict[str, int | str]]:
    """Bytes summed over everything but the columns named; ``dense`` is the same without a codec."""
    columns = list(dict.fromkeys(by or ["round", "direction"]))
    return page.of(ops.index.run(name).traffic(columns, round=round, node=node))


@router.get("/runs/{name}/events")
def events(
    ops: TheOperations,
    name: Name,
    after: Annotated[int, Query(ge=0, le=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> list[Event]:
    """The run's log, oldest first."""
    return ops.index.run(name).events(after, limit)


@router.get("/runs/{name}/logs")
def node_logs(
    ops: TheOperations,
    name: Name,
    node: NodeQuery = None,
    after: Annotated[int, Query(ge=0, le=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> list[NodeLog]:
    """Lines of the nodes' own logs, as they came with their replies; the newest hundred of each node."""
    return ops.index.run(name).node_logs(after, node=node, limit=limit)


@router.get("/runs/{name}/audit")
def run_audit(ops: TheOperations, name: Name) -> list[dict[str, Any]]:
    """Who did what to the run."""
    return ops.index.run(name).audit_log()


@router.get("/runs/{name}/config")
def config(ops: TheOperations, name: Name) -> dict[str, Any]:
    """The resolved configuration, as its TOML lays it out."""
    return ops.index.run(name).config.to_document()


@router.get("/runs/{name}/checkpoints")
def checkpoints(ops: TheOperations, name: Name) -> list[int]:
    """Rounds that the run can go back to."""
    return ops.checkpoints(name)


@router.get("/runs/{name}/output", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def output(ops: TheOperations, name: Name) -> Response:
    """The end of what the run's process has printed: one started from here, or the federation's."""
    ops.overview(name)
    return Response(ops.launcher.log(name), media_type="text/plain")


@router.get(
    "/runs/{name}/files/{file}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def download(
    ops: TheOperations, name: Name, file: downloads.File, round: Annotated[int | None, Query(ge=0)] = None
) -> Response:
    """Download the result (``adapter.zip`` of the last or a ``round``, ``adapter-best.zip``), report, ..."""
    return await downloads.respond(ops, name, file, round)


@router.post("/runs/{name}/commands", status_code=202)
def command(ops: TheOperations, who: Who, name: Name, body: Order) -> Accepted:
    """Pause, resume or stop a run, quarantine or release a node; obeyed before the next round."""
    ops.command(who, name, body.kind, body.node)
    return Accepted(name=name)


@router.post("/runs/{name}/continue", status_code=202)
def go_on(ops: TheOperations, who: Who, name: Name, body: GoOn) -> Accepted:
    """Go on with a run that is not under way, at its last checkpoint or an earlier one."""
    ops.go_on(who, name, body.round)
    return Accepted(name=name)


@router.post("/runs/{name}/dismiss", status_code=202)
def dismiss(ops: TheOperations, who: Who, name: Name) -> Accepted:
    """Take a run that did not start out of the list."""
    ops.dismiss(who, name)
    return Accepted(name=name)


@router.post("/runs/{name}/clone", status_code=202)
def clone(ops: TheOperations, who: Who, name: Name, body: Clone) -> Accepted:
    """Start a run with this one's configuration."""
    ops.clone(who, name, body.name, body.settings)
    return Accepted(name=body.name)


@router.get("/presets")
def presets(ops: TheOperations) -> list[Preset]:
    """List the configurations to start from."""
    return [Preset(**row) for row in ops.launcher.presets()]


@router.get("/presets/{preset}")
def preset(ops: TheOperations, preset: str) -> dict[str, Any]:
    """One preset's resolved configuration."""
    return ops.launcher.document(preset)


@router.get("/schema")
def schema(ops: TheOperations) -> dict[str, Any]:
    """JSON schemas of the configuration (``run``) and of every method's options (``methods``)."""
    return ops.launcher.schemas()


@router.get("/nodes")
def federation_nodes(ops: TheOperations) -> list[FederationNode]:
    """Nodes of the federation that is served beside; empty where runs are simulated."""
    return ops.federation_nodes()


@router.post("/nodes/{node}/revoke")
def revoke(ops: TheOperations, who: Who, node: Number) -> Accepted:
    """Forbid a node to join ever again."""
    ops.revoke(who, node)
    return Accepted(name=f"node {node}")


@router.post("/runs/{name}/nodes/{node}/forget")
def forget(ops: TheOperations, who: Who, name: Name, node: Number) -> Accepted:
    """Delete what a run that is over keeps about a node, except the bytes in its totals."""
    ops.forget(who, name, node)
    return Accepted(name=f"node {node}")


@router.get("/audit")
def audit(
    ops: TheOperations, who: Who, limit: Annotated[int, Query(ge=1, le=10_000)] = 200
) -> list[dict[str, Any]]:
    """Who did what, newest first; for operators."""
    return ops.audit_log(who, limit)


@router.get("/access")
def access(ops: TheOperations, who: Who) -> Users:
    """Users and tokens; for operators."""
    ops.require_operator(who)
    return Users(users=ops.accounts.users(), tokens=ops.accounts.tokens())


@router.post("/access/users", status_code=201)
def add_user(ops: TheOperations, who: Who, body: Named) -> Secret:
    """Add a user."""
    return Secret(name=body.name, secret=ops.add_user(who, body.name, body.role))


@router.post("/access/users/{name}/password", status_code=201)
def renew_password(ops: TheOperations, who: Who, name: str) -> Secret:
    """Give a user a new password; ends that user's sessions."""
    return Secret(name=name, secret=ops.renew_password(who, name))


@router.delete("/access/users/{name}")
def remove_user(ops: TheOperations, who: Who, name: str) -> Accepted:
    """Remove a user."""
    ops.remove_user(who, name)
    return Accepted(name=name)


@router.post("/access/tokens", status_code=201)
def add_token(ops: TheOperations, who: Who, body: Named) -> Secret:
    """Make an API token."""
    return Secret(name=body.name, secret=ops.add_token(who, body.name, body.role))


@router.delete("/access/tokens/{name}")
def remove_token(ops: TheOperations, who: Who, name: str) -> Accepted:
    """Revoke an API token."""
    ops.remove_token(who, name)
    return Accepted(name=name)
