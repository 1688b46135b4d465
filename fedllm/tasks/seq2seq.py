"""One text into another: summaries, translations, answers, by an encoder with a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedllm.data.columns import text
from fedllm.data.corpus import Example
from fedllm.tasks.base import IGNORED, Exercise, PerToken, Pooling, Scorer
from fedllm.tasks.causal import Perplexity
from fedllm.tasks.metrics import bleu, rouge_l

if TYPE_CHECKING:
    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.reading import Row
    from fedllm.data.tokens import Tokens

__all__ = ["Seq2Seq"]


class Seq2Seq(PerToken):
    """Learn the tokens of a target text from those of a source text and from each other (T5, BART)."""

    name: ClassVar[str] = "seq2seq"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "rouge_l", "bleu")
    generated: ClassVar[tuple[str, ...]] = ("rouge_l", "bleu")
    pipeline: ClassVar[str] = "text2text-generation"
    chatty: ClassVar[bool] = True
    one_text: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("source", "target")

    @property
    def pooling(self) -> Pooling:
        """The decoder predicts with its own output matrix."""
        return "seq2seq"

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's source and target."""
        source, target = (config.columns.get(role, role) for role in self.roles)
        found = text(row, source, "data.columns.source")
        wanted = text(row, target, "data.columns.target") if answered else ""
        return None if found is None or wanted is None else Example(found, parts=wanted)

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a source."""
        return {self.config.data.columns.get("source", "source"): text}

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Cut sources and targets at ``max_length`` tokens each; a target ends with its end token.

        Raises:
            DataError: as :func:`fedllm.data.tokens.encode`.
        """
        from fedllm.data.tokens import Answering, encode, ragged

        sources = encode(corpus, tokenizer, max_length)
        ids = tokenizer(text_target=corpus.parts or [], truncation=True, max_length=max_length)["input_ids"]
        columns = {field.name: getattr(sources, field.name) for field in fields(sources)}
        return Answering(**columns, answers=ragged(ids, None, tokenizer))

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what knows the perplexity."""
        return Perplexity()

    def exercises(self, tokens: Tokens, count: int) -> list[Exercise]:
        """Return sources and their targets."""
        rows = np.unique(np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(int))
        found = []
        for row in rows:
            batch = tokens.batch([row])
            wanted = batch.labels[0]
            found.append(Exercise(batch.input_ids[0].tolist(), wanted[wanted != IGNORED].tolist()))
        return found

    def marks(self, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """Return ``rouge_l`` and ``bleu``."""
        return {"rouge_l": rouge_l(written, wanted), "bleu": bleu(written, wanted)}

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return what was made of a text."""
        return str(answer["continuation"])


TASKS = (Seq2Seq,)
