"""Choosing among the answers that a question comes with (multiple choice: ARC, RACE, SWAG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedllm.data.columns import column, text
from fedllm.data.corpus import Example
from fedllm.data.reading import Row
from fedllm.errors import DataError
from fedllm.tasks.base import IGNORED, Each, Scorer

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.partition import Indices
    from fedllm.data.tokens import Tokens

__all__ = ["Choice"]

_MASKED = -1e4
"""Logit of a token that ends no choice: no probability in float32, and still finite."""


class _Hits(Scorer):
    def __init__(self, choice: Choice) -> None:
        self.choice, self.hits, self.count = choice, 0, 0

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        chosen = self.choice.predictions(logits, labels, {}).argmax(-1)
        self.hits += int((chosen == labels.argmax(-1)).sum())
        self.count += len(rows)

    def scores(self, loss: float) -> dict[str, float]:
        return {"accuracy": self.hits / max(self.count, 1)}


class Choice(Each):
    """One number for each choice, read at its last token; the highest is chosen.

    Question and choices stand in one row, so that an encoder compares them. The choices are never cut.
    """

    name: ClassVar[str] = "choice"
    each: ClassVar[str] = "choice"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    pipeline: ClassVar[str] = "multiple-choice"
    one_text: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("prompt", "choices", "answer")
    plain: ClassVar[bool] = False

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's question, its choices and the number of the right one.

        ``answer`` counts from 0, or is a letter, A for the first, or the right choice word for word.
        """
        names = config.columns
        question = text(row, names.get("prompt", "prompt"), "data.columns.prompt")
        if question is None:
            return None
        name = names.get("choices", "choices")
        choices = column(row, name, "data.columns.choices")
        good = isinstance(choices, list) and len(choices) > 1
        if not good or not all(isinstance(one, str) and one.strip() for one in choices):
            raise DataError(f"{row.where}: column {name!r} must list two or more texts, none of them empty")
        parts: dict[str, Any] = {"choices": choices}
        if answered:
            name = names.get("answer", "answer")
            parts["answer"] = _number(row, name, column(row, name, "data.columns.answer"), choices)
        return Example(question, parts=parts, key=question)

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a question to be answered with yes or no."""
        names = self.config.data.columns
        return {names.get("prompt", "prompt"): text, names.get("choices", "choices"): ["yes", "no"]}

    def outputs(self, names: Sequence[str]) -> int:
        """How good a choice is."""
        return 1

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Join every question with its choices, one below the other; questions that are too long are cut.

        Targets are 1 at the last token of the right choice and 0 at that of the others.

        Raises:
            DataError: choices have no token of their own, or leave no room for a question.
        """
        from fedllm.data.tokens import windows

        listed = [part["choices"] for part in corpus.parts or []]
        joined = ["\n".join(choices) for choices in listed]
        room = max_length - int(tokenizer.num_special_tokens_to_add(pair=True))
        sizes = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"] if joined else []
        for question, ids in zip(corpus.texts, sizes, strict=True):
            if len(ids) + 1 >= room:  # beside a question a tokenizer may begin them with a blank
                raise DataError(
                    f"the choices of {question[:60]!r} have {len(ids)} tokens and leave no room for the "
                    f"question: set data.max_length to {max_length - room + len(ids) + 2} at least"
                )
        tokens = windows(
            replace(corpus, labels=None),
            tokenizer,
            max_length,
            "truncate",
            (corpus.texts, joined),
            truncation="only_first",
            return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
        )
        assert tokens.places is not None
        targets = np.full(len(tokens.flat), IGNORED, dtype=np.int32)
        for row, (part, choices) in enumerate(zip(corpus.parts or [], listed, strict=True)):
            begin = int(tokens.starts[row])
            places = tokens.places[begin : begin + int(tokens.lengths[row])]
            ends = np.cumsum([len(choice) + 1 for choice in choices]) - 1
            # The last token that begins before a choice's end lies in it, unless the choice has none.
            lasts = [int(np.flatnonzero((places[:, 1] > 0) & (places[:, 0] < end))[-1]) for end in ends]
            if len(set(lasts)) < len(lasts):
                raise DataError(f"two choices of {corpus.texts[row][:60]!r} share their only token")
            targets[begin + np.array(lasts)] = np.arange(len(choices)) == part.get("answer", 0)
        return replace(tokens, targets=targets, labels=None, places=None)

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean cross-entropy over questions, of a softmax over each one's choices."""
        from torch.nn import functional

        return functional.cross_entropy(self.predictions(logits, labels, extra), labels.argmax(-1))

    def predictions(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the logits of the choices where these end, and of no other token: [b, t]."""
        return logits[..., 0].float().masked_fill(labels == IGNORED, _MASKED)

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what counts right choices."""
        return _Hits(self)

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return the choice, its probability and the question."""
        return f"{answer['choice']}\t{max(answer['probabilities']):.3f}\t{answer['text']}"

    def answers(
        self, corpus: Corpus, tokens: Tokens, logits: Sequence[torch.Tensor], names: Sequence[str]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return ``choice``, its number ``index`` from 0, and the ``probabilities`` of all choices."""
        assert tokens.targets is not None
        found = []
        for row, part in enumerate(corpus.parts or []):
            begin = int(tokens.starts[row])
            ends = np.flatnonzero(tokens.targets[begin : begin + int(tokens.lengths[row])] != IGNORED)
            probabilities = logits[row][ends.tolist(), 0].float().softmax(-1).tolist()
            best = int(np.argmax(probabilities))
            told = {"choice": part["choices"][best], "index": best, "probabilities": probabilities}
            found.append((row, told))
        return found


TASKS = (Choice,)


def _number(row: Row, name: str, given: Any, choices: Sequence[str]) -> int:
    """Return which choice an answer names."""
    count = len(choices)
    if isinstance(given, str):
        letters = [chr(ord("A") + number) for number in range(count)]
        for spelt in (choices, letters):
            if given in spelt:
                return spelt.index(given)
    elif isinstance(given, int) and not isinstance(given, bool) and 0 <= given < count:
        return given
    raise DataError(
        f"{row.where}: column {name!r} holds {given!r}; right is a number from 0 to {count - 1}, a letter "
        f"from A to {chr(ord('A') + count - 1)}, or one of the choices"
    )
