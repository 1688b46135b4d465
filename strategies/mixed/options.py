"""Options of mixed cohorts; no torch here."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from pydantic import Field

from fedllm.config import MethodOptions

__all__ = ["Options"]


class Options(MethodOptions):
    """Options of ``method = "mixed"``."""

    method = "mixed"
    implementation = "strategies.mixed.method:Mixed"
    descends = True
    slopes = True
    unread = ("tuning.blocks", "tuning.block_order")
    no_baseline = MappingProxyType(
        dict.fromkeys(
            ("local", "central"), "it deals clients out between training and probing, and a baseline has one"
        )
    )
    needs = MappingProxyType({"radius": ("estimator", ("antithetic",)), "parallel": ("estimator", ("jvp",))})

    share: float | None = Field(None, ge=0.0, le=1.0)
    """Share of the clients that probe and never train, dealt by seed; a half, unless ``nodes`` names them."""
    nodes: tuple[int, ...] = ()
    """Numbers of the clients that probe, from 0."""
    probed: tuple[str, ...] = ("*",)
    """Names of trained tensors that they probe, ``*`` standing for anything, such as ``head.*``."""
    weight: Literal["shrinkage", "texts", "none"] = "shrinkage"
    """How much probes count beside updates: as errors allow, by texts whatever the errors, or not at all."""
    directions: int = Field(20, ge=1, le=10_000)
    """Directions that such a client probes per round (P)."""
    estimator: Literal["jvp", "antithetic"] = "jvp"
    """``jvp`` is exact and fast, a step of ``antithetic`` needs no more memory than inference."""
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    """Of a direction's entries."""
    radius: float = Field(1e-2, gt=0.0, lt=1.0)
    """Length of an antithetic step relative to the probed tensors' norm."""
    parallel: int = Field(8, ge=1)
    """Directions that ``jvp`` carries side by side; memory grows with it."""
    cache_bytes: int = Field(256 * 2**20, ge=0)
    """Memory for hidden states of frozen lower layers; beyond it they go to files."""
