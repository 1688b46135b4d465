"""What requests to the API hold, and what it answers where no record of a run does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.dashboard.door.access import Role

__all__ = [
    "Accepted",
    "Clone",
    "GoOn",
    "Named",
    "Order",
    "Preset",
    "Problem",
    "Secret",
    "Session",
    "Start",
    "Users",
]


class Problem(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


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
