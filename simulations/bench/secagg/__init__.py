"""``fedllm bench secagg``: what secure aggregation costs a round beside the plain one: bytes and seconds."""

from __future__ import annotations

from simulations.bench.secagg.sessions import compare, run

__all__ = ["compare", "run"]
