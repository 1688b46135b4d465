"""``fedllm bench privacy``: what a budget of differential privacy costs, and takes from an attacker."""

from __future__ import annotations

from typing import Any

from simulations.bench.privacy import budgets, inference

__all__ = ["run"]


def run() -> dict[str, Any]:
    """Measure both: some twenty minutes on a shared core."""
    return {"accuracy": budgets.run(), "inference": inference.run()}
