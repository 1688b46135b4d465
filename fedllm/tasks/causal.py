"""Predicting each token of a text from those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedllm.data.columns import text
from fedllm.data.corpus import Example
from fedllm.tasks.base import IGNORED, PerToken, Pooling, Scorer

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.partition import Indices
    from fedllm.data.reading import Row
    from fedllm.data.tokens import Overlong, Tokens

__all__ = ["Causal", "Perplexity"]


class Perplexity(Scorer):
    """How surprised the model is."""

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """The loss says it all."""

    def scores(self, loss: float) -> dict[str, float]:
        """Return ``perplexity``, the exponential of the mean loss; what overflows is 1e304.

        >>> Perplexity().scores(0.0)
        {'perplexity': 1.0}
        """
        return {"perplexity": math.exp(min(loss, 700.0))}


class Causal(PerToken):
    """Next-token prediction on raw text."""

    name: ClassVar[str] = "causal"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
    pipeline: ClassVar[str] = "text-generation"
    chatty: ClassVar[bool] = True
    wanting: ClassVar[str] = "has a second token to predict; raise data.max_length, or take longer texts"

    @property
    def pooling(self) -> Pooling:
        """A language model predicts with its own output matrix."""
        return "causal"

    @property
    def overlong(self) -> tuple[Overlong, ...]:
        """Everything, unless a task that is built on this one makes tokens of its own."""
        return ("truncate", "split", "drop") if type(self).encode is Causal.encode else ("truncate",)

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's text."""
        found = text(row, config.text)
        return None if found is None else Example(found)

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Predict every token from those before it in its row; see ``data.overlong`` for long texts.

        Raises:
            DataError: as :func:`fedllm.data.tokens.encode`.
        """
        from fedllm.data.tokens import encode

        found = encode(corpus, tokenizer, max_length, self.config.data.overlong)
        return found.with_targets(found.flat)

    def teaching(self, tokens: Tokens) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """One token alone predicts none."""
        return np.asarray(tokens.lengths > 1)

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Position i predicts the token at i + 1."""
        from torch.nn import functional

        # Shifting the labels rather than the logits spares a copy of the largest tensor there is.
        return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what knows the perplexity."""
        return Perplexity()

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return the text with what comes after it."""
        return f"{answer['text']}{answer['continuation']}"


TASKS = (Causal,)
