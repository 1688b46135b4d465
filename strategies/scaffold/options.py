"""SCAFFOLD takes no options of its own; no torch here."""

from __future__ import annotations

from fedllm.config import MethodOptions

__all__ = ["Options"]


class Options(MethodOptions):
    """SCAFFOLD has no options of its own."""

    method = "scaffold"
    implementation = "strategies.scaffold.method:Scaffold"
    descends = True
    unread = ("tuning.blocks", "tuning.block_order")
