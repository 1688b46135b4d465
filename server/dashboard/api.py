"""Everything that the pages do, as JSON; described by OpenAPI at ``/api/openapi.json``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from fedllm.run_database import Event, NodeLog, NodeRound, Round
from server.dashboard import downloads
from server.dashboard.access import Principal, Role
from server.dashboard.desk import Desk
from server.dashboard.federation import FederationNode
from server.dashboard.shelf import Overview
from server.dashboard.totals import NodeTotal

__all__ = ["router"]


class Problem(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


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


class Body(BaseModel):
    """A request's content; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


Scalar = str | bool | int | float
Settings = dict[str, Scalar | list[Scalar]]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]{0,99}$")]


class Start(Body):
    """A new run."""

    name: RunName
    """Of the run and its folder."""
    preset: str
    """See ``/api/presets``."""
    settings: Settings = Field(default_factory=dict)
    """What differs from the preset, such as ``{"training.local_steps": 4}``."""


class Clone(Body):
    """A run like another."""

    name: RunName
    """Of the new run."""
    settings: Settings = Field(default_factory=dict)
    """What differs."""


class Order(Body):
    """Something that a run obeys before its next round."""

    kind: Literal["pause", "resume", "stop", "quarantine", "release"]
    node: int | None = Field(default=None, ge=0, le=2**31)
    """For quarantine and release."""


class GoOn(Body):
    """Where a run goes on."""

    round: int | None = Field(default=None, ge=0, le=2**31)
    """A checkpoint to roll back to; unset takes the last."""


class Named(Body):
    """A user or a token."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
    role: Role


class Secret(BaseModel):
    """Shown this once."""

    name: str
    secret: str


class Accepted(BaseModel):
    """Done, or on its way."""

    name: str


class Session(BaseModel):
    """Who asks."""

    name: str
    role: Role
    csrf: str
    """What a login repeats in ``X-CSRF-Token``; empty for a token, which needs none."""


class Preset(BaseModel):
    """A configuration to start from."""

    name: str
    shows: str
    costs: str


class Users(BaseModel):
    """Who may enter."""

    users: list[dict[str, str]]
    tokens: list[dict[str, Any]]


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


def _who(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


TheDesk = Annotated[Desk, Depends(_desk)]
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
    desk: TheDesk,
    state: Annotated[str | None, Query(description="Only runs in this state.")] = None,
    method: Annotated[str | None, Query(description="Only runs of this method.")] = None,
) -> list[Overview]:
    """List the runs: live ones first, then the latest change first."""
    return [
        view
        for view in desk.overviews()
        if (state is None or view.state == state) and (method is None or view.method == method)
    ]


@router.post("/runs", status_code=202)
def start(desk: TheDesk, who: Who, body: Start) -> Accepted:
    """Start a run from a preset, in a process of its own."""
    desk.start(who, body.name, body.preset, body.settings)
    return Accepted(name=body.name)


@router.get("/runs/{name}")
def run(desk: TheDesk, name: Name) -> Overview:
    """One run at a glance."""
    return desk.overview(name)


@router.get("/runs/{name}/rounds")
def rounds(desk: TheDesk, name: Name, after: Annotated[int, Query(ge=-1, le=2**31)] = -1) -> list[Round]:
    """Committed rounds, ascending; round 0 is the setup."""
    return [record for record in desk.shelf.rounds(name) if record.round > after]


@router.get("/runs/{name}/nodes")
def nodes(desk: TheDesk, name: Name) -> list[NodeTotal]:
    """Clients over the whole run."""
    return desk.shelf.nodes(name)


@router.get("/runs/{name}/answers")
def answers(desk: TheDesk, name: Name, round: RoundQuery = None, node: NodeQuery = None) -> list[NodeRound]:
    """What became of each client in each exchange; of one round, one node, or all."""
    return desk.shelf.run(name).nodes(round=round, node=node)


@router.get("/runs/{name}/traffic")
def traffic(
    desk: TheDesk,
    name: Name,
    by: Annotated[list[Literal["round", "node", "direction", "exchange", "record"]] | None, Query()] = None,
    round: RoundQuery = None,
    node: NodeQuery = None,
) -> list[dict[str, int | str]]:
    """Bytes summed over everything but the columns named; ``dense`` is the same without a codec."""
    columns = list(dict.fromkeys(by or ["round", "direction"]))
    return desk.shelf.run(name).traffic(columns, round=round, node=node)


@router.get("/runs/{name}/events")
def events(
    desk: TheDesk,
    name: Name,
    after: Annotated[int, Query(ge=0, le=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> list[Event]:
    """The run's log, oldest first."""
    return desk.shelf.run(name).events(after, limit)


@router.get("/runs/{name}/logs")
def node_logs(
    desk: TheDesk,
    name: Name,
    node: NodeQuery = None,
    after: Annotated[int, Query(ge=0, le=2**62)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> list[NodeLog]:
    """Lines of the nodes' own logs, as they came with their replies; the newest hundred of each node."""
    return desk.shelf.run(name).node_logs(after, node=node, limit=limit)


@router.get("/runs/{name}/audit")
def run_audit(desk: TheDesk, name: Name) -> list[dict[str, Any]]:
    """Who did what to the run."""
    return desk.shelf.run(name).audit_log()


@router.get("/runs/{name}/config")
def config(desk: TheDesk, name: Name) -> dict[str, Any]:
    """The resolved configuration, as its TOML lays it out."""
    return desk.shelf.run(name).config.to_document()


@router.get("/runs/{name}/checkpoints")
def checkpoints(desk: TheDesk, name: Name) -> list[int]:
    """Rounds that the run can go back to."""
    return desk.checkpoints(name)


@router.get("/runs/{name}/output", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def output(desk: TheDesk, name: Name) -> Response:
    """The end of what the run's process has printed: one started from here, or the federation's."""
    desk.overview(name)
    return Response(desk.launcher.log(name), media_type="text/plain")


@router.get(
    "/runs/{name}/files/{file}",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def download(desk: TheDesk, name: Name, file: downloads.File) -> Response:
    """Download the result (``adapter.zip``), the report, tables or the configuration."""
    return downloads.respond(desk, name, file)


@router.post("/runs/{name}/commands", status_code=202)
def command(desk: TheDesk, who: Who, name: Name, body: Order) -> Accepted:
    """Pause, resume or stop a run, quarantine or release a node; obeyed before the next round."""
    desk.command(who, name, body.kind, body.node)
    return Accepted(name=name)


@router.post("/runs/{name}/continue", status_code=202)
def go_on(desk: TheDesk, who: Who, name: Name, body: GoOn) -> Accepted:
    """Go on with a run that is not under way, at its last checkpoint or an earlier one."""
    desk.go_on(who, name, body.round)
    return Accepted(name=name)


@router.post("/runs/{name}/clone", status_code=202)
def clone(desk: TheDesk, who: Who, name: Name, body: Clone) -> Accepted:
    """Start a run with this one's configuration."""
    desk.clone(who, name, body.name, body.settings)
    return Accepted(name=body.name)


@router.get("/presets")
def presets(desk: TheDesk) -> list[Preset]:
    """List the configurations to start from."""
    return [Preset(**row) for row in desk.launcher.presets()]


@router.get("/presets/{preset}")
def preset(desk: TheDesk, preset: str) -> dict[str, Any]:
    """One preset's resolved configuration."""
    return desk.launcher.document(preset)


@router.get("/schema")
def schema(desk: TheDesk) -> dict[str, Any]:
    """JSON schemas of the configuration (``run``) and of every method's options (``methods``)."""
    return desk.launcher.schemas()


@router.get("/nodes")
def federation_nodes(desk: TheDesk) -> list[FederationNode]:
    """Nodes of the federation that is served beside; empty where runs are simulated."""
    return desk.federation_nodes()


@router.post("/nodes/{node}/revoke")
def revoke(desk: TheDesk, who: Who, node: Number) -> Accepted:
    """Forbid a node to join ever again."""
    desk.revoke(who, node)
    return Accepted(name=f"node {node}")


@router.post("/runs/{name}/nodes/{node}/forget")
def forget(desk: TheDesk, who: Who, name: Name, node: Number) -> Accepted:
    """Delete what a run that is over keeps about a node, except the bytes in its totals."""
    desk.forget(who, name, node)
    return Accepted(name=f"node {node}")


@router.get("/audit")
def audit(desk: TheDesk, limit: Annotated[int, Query(ge=1, le=10_000)] = 200) -> list[dict[str, Any]]:
    """Who did what, newest first."""
    return desk.audit_log(limit)


@router.get("/access")
def access(desk: TheDesk, who: Who) -> Users:
    """Users and tokens; for operators."""
    desk.require_operator(who)
    return Users(users=desk.accounts.users(), tokens=desk.accounts.tokens())


@router.post("/access/users", status_code=201)
def add_user(desk: TheDesk, who: Who, body: Named) -> Secret:
    """Add a user, or give one a new password."""
    return Secret(name=body.name, secret=desk.add_user(who, body.name, body.role))


@router.delete("/access/users/{name}")
def remove_user(desk: TheDesk, who: Who, name: str) -> Accepted:
    """Remove a user."""
    desk.remove_user(who, name)
    return Accepted(name=name)


@router.post("/access/tokens", status_code=201)
def add_token(desk: TheDesk, who: Who, body: Named) -> Secret:
    """Make an API token."""
    return Secret(name=body.name, secret=desk.add_token(who, body.name, body.role))


@router.delete("/access/tokens/{name}")
def remove_token(desk: TheDesk, who: Who, name: str) -> Accepted:
    """Revoke an API token."""
    desk.remove_token(who, name)
    return Accepted(name=name)
