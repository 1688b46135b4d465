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
    """What bounds a single client's influence."""

    clip: float | None = Field(default=None, gt=0.0)
    """L2 norm to which a client scales its update down before encoding, and the server after decoding."""
