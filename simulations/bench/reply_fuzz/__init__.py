"""``fedllm bench reply_fuzz``: hostile bytes, to codecs and as whole replies to a round."""

from __future__ import annotations

from simulations.bench.reply_fuzz.replies import run

__all__ = ["run"]
