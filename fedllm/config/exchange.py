"""The sections of what becomes of an update before it leaves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedllm.section import Section


class CodecConfig(Section):
    """How updates are compressed: ``"none"`` or a chain such as ``"quantize(bits=8) | entropy"``."""

    up: str = "none"
    """Client to server."""
    down: str = "none"
    """Server to client."""


class PrivacyConfig(Section):
    """What bounds a single client's influence, hides it, and what the server sees of it."""

    unit: Literal["client", "example"] = "client"
    """What differential privacy hides: a whole ``client``, by noise on sums of updates, or each ``example``,
    by noise that the client adds to every step of its training (DP-SGD; Abadi et al., CCS 2016)."""
    clip: float | None = Field(default=None, gt=0.0)
    """L2 norm to which a client scales its update down before encoding, and the server after decoding; with
    ``unit = "example"`` that of the gradient of each text."""
    clip_quantile: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Let ``clip`` be the first round's, and follow the norm that this share of updates does not exceed
    (Andrew et al., NeurIPS 2021), such as 0.5; the count that it takes is noised, and accounted for."""
    clip_rate: float = Field(default=0.2, gt=0.0, le=2.0)
    """How fast it follows: a round multiplies it by exp(-``clip_rate`` (share - ``clip_quantile``))."""
    secure_aggregation: bool = False
    """Let the server learn the sum of a round's updates and none by itself (Bonawitz et al., CCS 2017)."""
    threshold: float = Field(default=0.667, ge=0.5, lt=1.0)
    """Under secure aggregation, share of the clients that begin a round of whom more must stay to its end."""
    neighbours: int | None = Field(default=None, ge=2, multiple_of=2)
    """Under secure aggregation, clients against whom each is masked, an even number (Bell et al., CCS 2020);
    unset takes all others."""
    noise_multiplier: float | None = Field(default=None, ge=0.1, le=1e6)
    """Differential privacy: standard deviation, in units of ``clip``, of the Gaussian noise that the server
    adds to the sum of a round's updates. Each client then takes part by a coin of its own. Under secure
    aggregation clients add it, and the shares of ``server.quorum`` of them make it whole. With
    ``unit = "example"`` it is on the sum of a step's gradients, at each client."""
    target_epsilon: float | None = Field(default=None, gt=0.0, le=1e3)
    """Budget that ends the run once it is spent; without ``noise_multiplier`` the least noise is taken with
    which ``rounds`` keep to it. With ``unit = "example"`` each client does so for itself."""
    delta: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Of (epsilon, delta); unset is n^-1.1 of n clients, or of a client's n texts."""

    @property
    def hides(self) -> Literal["client", "example", ""]:
        """What the run's differential privacy hides; empty where it has none."""
        return self.unit if self.noise_multiplier is not None or self.target_epsilon is not None else ""

    @property
    def noised(self) -> bool:
        """Whether sums of updates are noised, which hides whole clients."""
        return self.hides == "client"

    @property
    def update_clip(self) -> float | None:
        """L2 norm to which updates are clipped; None where they are not."""
        return self.clip if self.unit == "client" else None
