"""FedAvg takes no options of its own; no torch here."""

from __future__ import annotations

from fedllm.config import MethodOptions

__all__ = ["Options"]


class Options(MethodOptions):
    """FedAvg has no options of its own."""

    method = "fedavg"
    implementation = "strategies.fedavg.method:FedAvg"
    descends = True
    unread = ("tuning.rank", "tuning.alpha", "tuning.targets", "tuning.options")
