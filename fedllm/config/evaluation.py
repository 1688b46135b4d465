"""The sections of what is measured and of what is kept."""

from __future__ import annotations

from pydantic import Field

from fedllm.section import Section


class EvaluationConfig(Section):
    """When quality is measured, and on what."""

    every: int = Field(default=1, ge=0)
    """Rounds between evaluations on the server's test set; 0 never evaluates."""
    metric: str | None = None
    """Metric that decides which round is the best and is shown first; unset takes the task's first."""
    patience: int = Field(default=0, ge=0)
    """Evaluations without a better value of that metric, after which the run ends; 0 never ends it."""
    clients: bool = False
    """Also evaluate on each sampled client's held-out part."""
    batch_size: int = Field(default=64, ge=1)
    """Texts per evaluation batch."""
    generate: int = Field(default=0, ge=0)
    """Held-out examples that a model which answers by text is made to answer, and scored by."""
    new_tokens: int = Field(default=64, ge=1)
    """Tokens that such an answer has at most."""


class CheckpointConfig(Section):
    """Which checkpoints are kept, beside that of the best round; one is written after every round."""

    last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    every: int = Field(default=0, ge=0)
    """Also keep that of every so manieth round, the first being round 0; 0 keeps none but the newest."""
