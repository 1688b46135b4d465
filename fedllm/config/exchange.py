"""The sections of what becomes of an update before it leaves."""

from __future__ import annotations

from pydantic import Field

from fedllm.section import Section


class CodecConfig(Section):
    """How updates are compressed: ``"none"`` or a chain such as ``"quantize(bits=8) | entropy"``."""

    up: str = "none"
    """Client to server."""
    down: str = "none"
    """Server to client."""


class PrivacyConfig(Section):
    """What bounds a single client's influence, and what the server sees of it."""

    clip: float | None = Field(default=None, gt=0.0)
    """L2 norm to which a client scales its update down before encoding, and the server after decoding."""
    secure_aggregation: bool = False
    """Let the server learn the sum of a round's updates and none by itself (Bonawitz et al., CCS 2017)."""
    threshold: float = Field(default=0.667, ge=0.5, lt=1.0)
    """Under secure aggregation, share of the clients that begin a round of whom more must stay to its end."""
    neighbours: int | None = Field(default=None, ge=2, multiple_of=2)
    """Under secure aggregation, clients against whom each is masked, an even number (Bell et al., CCS 2020);
    unset takes all others."""
