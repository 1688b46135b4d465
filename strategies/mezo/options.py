"""Options of MeZO and FedKSeed; no torch here."""

from __future__ import annotations

from pydantic import Field

from fedllm.config import MethodOptions

__all__ = ["Options"]


class Options(MethodOptions):
    """Options of ``method = "mezo"``."""

    method = "mezo"
    implementation = "strategies.mezo.method:MeZO"
    slopes = True
    unread = ("training.optimizer", "model.dropout", "tuning.blocks", "tuning.block_order")

    candidates: int = Field(0, ge=0, le=65_536)
    """Directions that all clients share (FedKSeed takes 1,024 to 4,096); 0 draws fresh ones (MeZO)."""
    cache: bool = True
    """Compute hidden states of frozen lower layers once per text; pays where texts are drawn repeatedly."""
    cache_bytes: int = Field(256 * 2**20, ge=0)
    """Memory for hidden states of frozen lower layers; beyond it they go to files."""
    radius: float = Field(1e-2, gt=0.0, lt=1.0)
    """Length of a probe relative to the trained tensors' norm."""
