"""Answering: conversations of which a model learns what the assistant says, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from fedllm.data.corpus import Example
from fedllm.data.reading import Row
from fedllm.data.shapes.conversations import conversation_shape, messages
from fedllm.errors import DataError
from fedllm.tasks.base import IGNORED, Exercise, PerToken, Scorer
from fedllm.tasks.causal import Causal, Perplexity
from fedllm.tasks.chat import Answered, cut, render, turn_ends, with_answers
from fedllm.tasks.metrics import exact_match, rouge_l

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig, RunConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.partition import Indices
    from fedllm.data.tokens import Tokens

__all__ = ["Hits", "Instruct", "answered_rows", "asked", "learnable", "prompts", "written"]

logger = logging.getLogger(__name__)

_ANY = "..."
"""What stands where an answer is to be made, for those who read rows."""

Written = TypeVar("Written")


class Hits(Scorer):
    """How surprised the model is by what it should say, and how often it would have said the next token."""

    def __init__(self, task: PerToken) -> None:
        self.task, self.hits, self.predicted = task, 0, 0

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count the tokens that were likeliest."""
        targets = self.task.targets(labels)
        known = targets != IGNORED
        self.hits += int((logits.argmax(-1).cpu()[known] == targets[known]).sum())
        self.predicted += int(known.sum())

    def scores(self, loss: float) -> dict[str, float]:
        """Return ``perplexity`` and ``token_accuracy``."""
        return {**Perplexity().scores(loss), "token_accuracy": self.hits / max(self.predicted, 1)}


class Instruct(Causal):
    """Supervised tuning on conversations: the loss is that of the assistant's tokens alone.

    The last turns count most: of what is longer than ``data.max_length`` the beginning is cut, and never the
    whole answer.
    """

    name: ClassVar[str] = "instruct"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy", "exact_match", "rouge_l")
    generated: ClassVar[tuple[str, ...]] = ("exact_match", "rouge_l")
    wanting: ClassVar[str] = "has an answer to learn"
    one_text: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = (
        "messages", "conversations", "prompt", "response", "completion", "instruction", "input", "output",
        "system",
    )  # fmt: skip

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.shapes: set[str] = set()

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's conversation; nothing where the assistant says nothing in it."""
        if not answered:
            return asked(row, config.columns)
        found = messages(row, config.columns)
        self._say(conversation_shape(row, config.columns), row)
        return None if found is None else Example(_text(found), parts=found)

    def _say(self, shape: str, row: Row) -> None:
        """Say by which columns conversations are recognised, once for each shape."""
        if shape not in self.shapes and logger.isEnabledFor(logging.INFO):
            self.shapes.add(shape)
            logger.info("conversations are read from %s (%s)", shape, row.where)

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a prompt."""
        return {self.config.data.columns.get("prompt", "prompt"): text}

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Write every conversation by the tokenizer's chat template; see :mod:`fedllm.tasks.chat`.

        Raises:
            DataError: the template refuses a conversation, or tokenises it otherwise with its answer than
                without; names file and line.
        """
        if corpus.parts and corpus.parts[0][-1]["role"] != "assistant":
            return prompts(corpus, tokenizer, max_length)
        rows = written(corpus, lambda turns: with_answers(tokenizer, turns))
        return answered_rows(rows, tokenizer, max_length)

    def ends(self, tokenizer: Any) -> frozenset[int]:
        """Return the token by which the chat template ends a turn, where it has one."""
        return turn_ends(tokenizer)

    def teaching(self, tokens: Tokens) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which conversations have something of an answer left after what is too long was cut."""
        return learnable(tokens)

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what knows perplexity and counts hits."""
        return Hits(self)

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return the question, and below it the answer."""
        return f"{answer['text']}\n{answer['continuation'].strip()}"

    def exercises(self, tokens: Tokens, count: int) -> list[Exercise]:
        """Return conversations up to their last answer, and that answer."""
        found = []
        for row in np.unique(np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(int)):
            batch = tokens.batch([row])
            ids, said = batch.input_ids[0].tolist(), (batch.labels[0] != IGNORED).tolist()
            end = len(said) - said[::-1].index(True) if True in said else 0
            first = end
            while first > 0 and said[first - 1]:
                first -= 1
            if 0 < first < end:
                found.append(Exercise(ids[:first], ids[first:end]))
        return found

    def marks(self, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """Return ``exact_match`` and ``rouge_l``."""
        return {"exact_match": exact_match(written, wanted), "rouge_l": rouge_l(written, wanted)}


TASKS = (Instruct,)


def answered_rows(found: Sequence[Answered], tokenizer: Any, max_length: int) -> Tokens:
    """Lay conversations one after the other, cut from the left to ``max_length``."""
    from fedllm.data.tokens import ragged

    begin = tokenizer.bos_token_id
    short = [cut(one, max_length, begin) for one in found]
    tokens = ragged([one.ids for one in short], None, tokenizer)
    said = np.fromiter((said for one in short for said in one.mask), dtype=np.bool_, count=len(tokens.flat))
    longer = np.array([len(one.ids) > max_length for one in found], dtype=np.bool_)
    return replace(tokens, targets=np.where(said, tokens.flat, IGNORED).astype(np.int32), cut=longer)


def asked(row: Row, names: Mapping[str, str]) -> Example | None:
    """Return a row's conversation up to where the assistant is to answer."""
    columns = row.columns
    supposed: dict[str, Any] = {}
    for role in ("messages", "conversations"):
        turns = columns.get(names.get(role, role))
        if isinstance(turns, list):
            supposed[names.get(role, role)] = [*turns, {"role": "assistant", "content": _ANY}]
            break
    else:
        supposed = {names.get(role, role): _ANY for role in ("response", "completion", "output")}
    found = messages(row.supposing(supposed), names)
    return None if found is None else Example(_text(found[:-1]), parts=found[:-1])


def prompts(corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
    """Write conversations that end where the assistant is to answer."""
    found = written(corpus, lambda turns: render(tokenizer, turns, generation_prompt=True))
    return answered_rows([Answered(ids, [True] * len(ids)) for ids in found], tokenizer, max_length)


def learnable(tokens: Tokens) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which rows have something to predict behind their first token: [rows] bool."""
    assert tokens.targets is not None
    predicted = np.concatenate([[0], np.cumsum(tokens.targets != IGNORED)])
    ends = tokens.starts + tokens.lengths
    return np.asarray(predicted[ends] - predicted[np.minimum(tokens.starts + 1, ends)] > 0)


def written(corpus: Corpus, write: Callable[[Any], Written]) -> list[Written]:
    """Write every conversation; what a template objects to is told with file and line."""
    found = []
    for index, parts in enumerate(corpus.parts or []):
        try:
            found.append(write(parts))
        except DataError as error:
            raise DataError(f"{corpus.place(index)}: {error}") from error
    return found


def _text(turns: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(turn["content"] for turn in turns)
