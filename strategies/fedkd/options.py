"""Options of FedKD; no torch here."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

from pydantic import Field

from fedllm.config import MethodOptions

__all__ = ["Options"]


class Options(MethodOptions):
    """What the student is, who learns from whom, and how the teacher is trained."""

    method = "fedkd"
    implementation = "strategies.fedkd.method:FedKD"
    descends = True
    unread = ("tuning.blocks", "tuning.block_order")
    needs = MappingProxyType(
        {
            "layers": ("student", (None,)),
            "teacher_learning_rate": ("teacher", (True,)),
            "teacher_optimizer": ("teacher", (True,)),
            "mutual": ("teacher", (True,)),
            "hidden": ("teacher", (True,)),
            "attention": ("teacher", (True,)),
            "ramp": ("teacher", (True,)),
            "adaptive": ("teacher", (True,)),
            "hidden_weight": ("teacher", (True,)),
            "match": ("teacher", (True,)),
            "mutual_weight": ("mutual", (True,)),
            "temperature": ("mutual", (True,)),
            "divergence": ("mutual", (True,)),
            "literal": ("adaptive", (True,)),
        }
    )

    layers: int | tuple[int, ...] = 2
    """Layers of the base model that the student keeps: how many, spread evenly, or which ones, from 0."""
    width: int | None = Field(None, ge=1)
    """Narrower width of the student, reduced by SVD; unset keeps the base model's."""
    student: str | None = None
    """Another model, with the teacher's tokenizer, to be the student; replaces ``layers`` and ``width``."""
    embeddings: Literal["frozen", "teacher", "trained"] = "frozen"
    """Whose embeddings and output matrix are trained: nobody's, the teachers', or the student's too."""
    teacher: bool = True
    """Train a private teacher, tuned as [tuning] says; false leaves the student to its own task loss."""
    teacher_learning_rate: float | None = Field(None, gt=0.0)
    """Teacher's learning rate at the first round; unset takes training.learning_rate."""
    teacher_optimizer: Literal["adamw", "sgd"] = "adamw"
    """Teacher's optimiser; adamw keeps its moments on the client from round to round, sgd has none."""
    mutual: bool = True
    """Exchange predictions: the KL terms."""
    hidden: bool = True
    """Compare hidden states of matched layers."""
    attention: bool = True
    """Compare attention maps of matched layers."""
    match: Literal["spread", "origin"] = "spread"
    """Teacher layers that the student's are compared with: spread evenly, or those it was made from."""
    mutual_weight: float = Field(1.0, ge=0.0)
    """Multiplies the KL terms."""
    hidden_weight: float = Field(1.0, ge=0.0)
    """Multiplies the hidden loss, hidden states and attention maps together."""
    ramp: float = Field(0.0, ge=0.0, le=1.0)
    """Share of the run over which all terms but the task losses rise linearly from 0 to their weight."""
    temperature: float = Field(1.0, gt=0.0)
    """Softens both predictions of the KL terms."""
    divergence: Literal["forward", "reverse"] = "forward"
    """KL(other || learner), or KL(learner || other), which suits generative students (MiniLLM)."""
    adaptive: bool = True
    """Divide all terms but the task losses by D = Lt + Ls; false leaves them as they are."""
    literal: bool = False
    """Leave the divisor D in the graph, as the paper's equations can be read."""
