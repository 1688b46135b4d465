"""Options of FwdLLM; no torch here."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from pydantic import Field

from fedllm.config import MethodOptions

__all__ = ["Options", "Rule", "Start"]

Rule = Literal["fixed", "ratio", "variance"]
"""Of pacing."""
Start = Literal["none", "means", "cosine", "ridge"]
"""Of the head, in closed form."""


class Options(MethodOptions):
    """Options of ``method = "fwdllm"``."""

    method = "fwdllm"
    implementation = "strategies.fwdllm.method:FwdLLM"
    slopes = True
    unread = (
        "training.local_steps",
        "training.optimizer",
        "training.learning_rate",
        "training.schedule",
        "model.dropout",
        "tuning.blocks",
        "tuning.block_order",
    )
    no_baseline = MappingProxyType(
        {
            "central": "a round of it is one batch and its directions for each client, of which more local "
            "steps make no more"
        }
    )
    needs = MappingProxyType(
        {
            "radius": ("estimator", ("antithetic",)),
            "parallel": ("estimator", ("jvp",)),
            "threshold": ("pacing", ("ratio", "variance")),
            "pacing_tensor": ("pacing", ("variance",)),
            "max_exchanges": ("pacing", ("ratio", "variance")),
        }
    )

    directions: int = Field(10, ge=1, le=10_000)
    """Directions that a client probes per exchange (P)."""
    estimator: Literal["jvp", "antithetic"] = "jvp"
    """``jvp`` is exact and fast, a step of ``antithetic`` needs no more memory than inference."""
    candidates: int = Field(1, ge=1, le=100)
    """Directions drawn per direction probed; above 1 those in line with the previous round are preferred."""
    shared: bool = False
    """All clients probe the same directions, so that slopes can be summed under secure aggregation."""
    distribution: Literal["rademacher", "gaussian", "orthogonal"] = "rademacher"
    """Of a direction's entries; ``orthogonal``: signs of directions at right angles, none of them twice."""
    radius: float = Field(1e-2, gt=0.0, lt=1.0)
    """Length of an antithetic step relative to the trained tensors' norm."""
    parallel: int = Field(8, ge=1)
    """Directions that ``jvp`` carries side by side; memory grows with it."""
    upload: Literal["scalars", "dense"] = "scalars"
    """``dense`` sends each client's forward gradient, as the paper's code does; for comparison."""
    step: Literal["trust", "mean"] = "trust"
    """``trust`` moves by a share of the weights' norm, ``mean`` by the gradient, for ``server.optimizer``."""
    learning_rate: float = Field(0.1, gt=0.0)
    """Share of the norm (``trust``) or factor of the gradient (``mean``) at the first round."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to the last round."""
    pacing: Rule = "fixed"
    """When a round has enough directions: after one exchange, by signal to noise, or by the paper's rule."""
    threshold: float = Field(0.1, gt=0.0)
    """Least signal-to-noise ratio (``ratio``), or largest variance of ``pacing_tensor`` (``variance``)."""
    pacing_tensor: str = ""
    """Trained tensor that the paper's rule looks at; empty takes the last by name."""
    max_exchanges: int = Field(4, ge=1)
    """Exchanges after which a round commits whatever the gate says."""
    warm_start: Start = "none"
    """Closed-form start of the head: ``means``, ``cosine`` or ``ridge``."""
    cache: bool = True
    """Compute hidden states of frozen lower layers once per text; pays where texts are drawn repeatedly."""
    cache_bytes: int = Field(256 * 2**20, ge=0)
    """Memory for hidden states of frozen lower layers; beyond it they go to files."""
    max_growth: float = Field(4.0, gt=1.0)
    """Growth of the trained tensors' norm at which the run is stopped as collapsed."""
