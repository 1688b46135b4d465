"""Options of FedNova; no torch here."""

from __future__ import annotations

from pydantic import Field

from fedllm.config import MethodOptions

__all__ = ["Options"]


class Options(MethodOptions):
    """How many local steps a client takes."""

    method = "fednova"
    implementation = "strategies.fednova.method:FedNova"
    descends = True
    unread = ("tuning.blocks", "tuning.block_order")

    epochs: float = Field(1.0, gt=0.0)
    """Passes of a client over its own texts in one round, in at most training.local_steps steps."""
