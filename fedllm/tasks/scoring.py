"""What a model is scored by: exercises to be answered, and what gathers its predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from fedllm.data.partition import Indices

__all__ = ["Exercise", "Scorer"]


class Exercise(NamedTuple):
    """A prompt and the answer that is wanted, both as token numbers."""

    prompt: list[int]
    answer: list[int]


class Scorer(ABC):
    """Gathers predictions batch by batch and says what they are worth."""

    @abstractmethod
    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in one batch.

        Args:
            rows: which rows of the tokens these are.
            logits: of the batch, as the network returned them.
            labels: of the batch, on the CPU.
        """

    @abstractmethod
    def scores(self, loss: float) -> dict[str, float]:
        """Return the metrics of everything taken in, by name, given the mean loss."""
