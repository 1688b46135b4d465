"""Options of federated LoRA; no torch here."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from fedllm.config import MethodOptions

__all__ = ["LACKING", "WITH_BASE", "Options"]

WITH_BASE = ("stack", "residual")
"""Rules that add to the base."""
LACKING = (
    "its A is what the clients share, and its B is zero: each client keeps a B of its own (FedSA-LoRA), "
    "without which the adapter does nothing"
)
"""What a result of rule fedsa lacks."""


class Options(MethodOptions):
    """How adapters are aggregated, and which client has which rank."""

    method = "lora"
    implementation = "strategies.lora.method:Lora"
    descends = True

    rule: Literal["fedit", "ffa", "stack", "svd", "residual", "alternate", "hetero", "fed-sb", "fedsa"] = (
        "fedit"
    )
    """Aggregation rule."""
    ranks: tuple[int, ...] = ()
    """Rank of each client, or with ``shares`` the ranks to hand out; empty gives every client tuning.rank."""
    shares: tuple[float, ...] = ()
    """Share of the clients that has each of ``ranks``; who has which is drawn by the seed."""
    memory_mb: tuple[float, ...] = ()
    """MiB each client has for adapter, gradients and optimiser: decides its rank instead of ``ranks``."""
    base_rank: int | None = Field(None, ge=1)
    """Rank that rules stack and residual keep of what they add to the base; unset keeps all, exactly."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.ranks and self.memory_mb:
            raise ValueError("ranks and memory_mb both decide the clients' ranks; give one")
        if self.shares and (len(self.shares) != len(self.ranks) or not math.isclose(sum(self.shares), 1.0)):
            raise ValueError(f"shares = {self.shares} must sum to 1, one for each of ranks = {self.ranks}")
        if min((*self.ranks, *self.memory_mb, *self.shares), default=1) <= 0:
            raise ValueError("ranks, shares and memory_mb must be positive")
        if self.base_rank is not None and self.rule not in WITH_BASE:
            raise ValueError(f"base_rank belongs to the rules stack and residual, not to {self.rule}")
        return self
