"""Finding entities: a tag for every word of a text, in IOB2."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedllm.data.corpus import Example
from fedllm.data.reading import Row
from fedllm.data.shapes.columns import absent, structured
from fedllm.data.shapes.entities import iob2, tagged
from fedllm.errors import DataError
from fedllm.tasks.base import IGNORED, Each, PerToken, Scorer

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.partition import Indices
    from fedllm.data.tokens import Overlong, Tokens

__all__ = ["EntityScores", "TokenTask", "entities"]

_NONE = "O"
logger = logging.getLogger(__name__)


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return first word, last word and kind of each entity; an ``I-`` that continues nothing begins one.

    >>> entities(["B-city", "I-city", "O", "I-name"])
    [(0, 1, 'city'), (3, 3, 'name')]
    """
    found: list[tuple[int, int, str]] = []
    for place, tag in enumerate(iob2(tags)[0]):
        if tag.startswith("B-"):
            found.append((place, place, tag[2:]))
        elif tag.startswith("I-"):
            found[-1] = (found[-1][0], place, tag[2:])
    return found


class EntityScores(Scorer):
    """Counts entities that were found with the right words and the right kind, over whole texts."""

    def __init__(self, tokens: Tokens, names: Sequence[str]) -> None:
        self.tokens, self.names = tokens, names
        self.actual: dict[int, list[int]] = {}
        self.predicted: dict[int, list[int]] = {}

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Note the likeliest tag of every word."""
        likeliest, known = logits.argmax(-1).cpu(), labels != IGNORED
        for place, row in enumerate(rows.tolist()):
            self.actual[row] = labels[place][known[place]].tolist()
            self.predicted[row] = likeliest[place][known[place]].tolist()

    def scores(self, loss: float) -> dict[str, float]:
        """Return ``f1``, ``precision`` and ``recall`` over all entities, in [0, 1], where there are any.

        By kind there are ``f1/KIND``, ``precision/KIND``, ``recall/KIND``, and how many entities are of it
        (``texts/KIND``) and were taken for it (``predicted/KIND``).
        """
        from nervaluate import Evaluator  # type: ignore[import-untyped]  # ships no marker

        texts = [self.tokens.rows_of(text) for text in self.tokens.texts().tolist()]
        actual, predicted = (
            [[self.names[tag] for row in rows for tag in tags[row]] for rows in texts]
            for tags in (self.actual, self.predicted)
        )
        kinds = sorted({name[2:] for name in self.names} - {""})
        found = Evaluator(actual, predicted, tags=kinds, loader="list").evaluate()
        whole = found["overall"]["strict"]
        scores = {"f1": whole.f1, "precision": whole.precision, "recall": whole.recall}
        scores = scores if whole.possible else {}
        for kind in sorted(found["entities"]):
            one = found["entities"][kind]["strict"]
            scores |= {
                f"texts/{kind}": one.possible,
                f"predicted/{kind}": one.actual,
                f"precision/{kind}": one.precision,
                f"recall/{kind}": one.recall,
                f"f1/{kind}": one.f1,
            }
        return {name: float(value) for name, value in scores.items()}


class TokenTask(Each, PerToken):
    """A tag for every word, learnt and read at the word's first token."""

    name: ClassVar[str] = "tokens"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall")
    alone: ClassVar[tuple[str, ...]] = metrics
    pipeline: ClassVar[str] = "token-classification"
    classed: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("tokens", "tags", "spans", "entities")
    wanting: ClassVar[str] = "has a word to tag"

    def misfit(self) -> str | None:
        """Classes that are given must be tags."""
        names = self.config.data.classes
        odd = [name for name in names if name != _NONE and name[:2] not in ("B-", "I-")]
        odd += [name for name in names if name.startswith("I-") and f"B-{name[2:]}" not in names]
        if odd or (names and _NONE not in names):
            said = f", and {odd[0]!r} stands there" if odd else ""
            return (
                f'data.classes must name all tags of model.task = "tokens": O, and B-KIND and I-KIND of each '
                f"kind{said}"
            )
        return super().misfit()

    @property
    def overlong(self) -> tuple[Overlong, ...]:
        """Everything."""
        return ("truncate", "split", "drop")

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's text, where its words lie in it, and their tags; words are joined by blanks."""
        names = {"text": config.text, **config.columns}
        found = tagged(row if answered else _unanswered(row, names), names)
        if found is None:
            return None
        listed = names.get("tokens", "tokens") in row.columns
        text = " ".join(found.tokens) if listed else str(row.columns[config.text])
        places, end = [], 0
        for word in found.tokens:
            start = text.index(word, end)
            end = start + len(word)
            places.append([start, end])
        parts = {"words": places, "tags": found.tags, "repaired": found.repaired}
        return Example(text, parts=parts if answered else {"words": places})

    def number(
        self, examples: Sequence[Example], names: tuple[str, ...] | None
    ) -> tuple[Indices | None, tuple[str, ...]]:
        """Name the tags: O, then B- and I- of each kind by alphabet, unless the federation has.

        Raises:
            DataError: a tag is none of the federation's.
        """
        used = {tag for example in examples for tag in example.parts["tags"]}
        if repaired := sum(example.parts["repaired"] for example in examples):
            tags = sum(len(example.parts["tags"]) for example in examples)
            logger.warning("%d of %d tags are not written as IOB2 has them and are read so", repaired, tags)
        if names is not None:
            if strange := sorted(used - set(names)):
                raise DataError(f"tag {strange[0]!r} is none of the federation's: {', '.join(names)}")
            return None, names
        kinds = sorted({tag[2:] for tag in used} - {""})
        return None, (_NONE, *(f"{mark}-{kind}" for kind in kinds for mark in "BI"))

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Put the tag of every word on its first token; ``places`` are those of words.

        Raises:
            DataError: as :func:`fedllm.data.tokens.encode`.
        """
        from fedllm.data.tokens import encode

        tokens = encode(
            replace(corpus, labels=None), tokenizer, max_length, self.config.data.overlong, places=True
        )
        assert tokens.places is not None
        numbers = {name: number for number, name in enumerate(corpus.label_names)}
        targets = np.full(len(tokens.flat), IGNORED, dtype=np.int32)
        places = np.zeros_like(tokens.places)
        for text in tokens.texts().tolist():
            part = (corpus.parts or [])[text]
            rows = [(tokens.starts[row], tokens.lengths[row]) for row in tokens.rows_of(text)]
            here = np.concatenate([np.arange(start, start + length) for start, length in rows])
            words = np.array(part["words"], dtype=np.int32)
            chosen, spots = _first_tokens(tokens.places[here], words)
            tags = [numbers[tag] for tag in part["tags"]] if "tags" in part else [0] * len(words)
            targets[here[spots]] = np.array(tags, dtype=np.int32)[chosen]
            places[here[spots]] = words[chosen]
        return replace(tokens, places=places, targets=targets, labels=None)

    def notes(self, corpus: Corpus, tokens: Tokens) -> list[str]:
        """Say also how many words have no token."""
        words = sum(len((corpus.parts or [])[text]["words"]) for text in tokens.texts().tolist())
        assert tokens.targets is not None
        lost = words - int((tokens.targets != IGNORED).sum())
        said = f"{lost} of {words} words have no token of their own in what is read: they are left out"
        return super().notes(corpus, tokens) + ([said] if lost else [])

    def teaching(self, tokens: Tokens) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """A row in which no word begins teaches nothing."""
        assert tokens.targets is not None
        counts = np.concatenate([[0], np.cumsum(tokens.targets != IGNORED)])
        return np.asarray(counts[tokens.starts + tokens.lengths] > counts[tokens.starts])

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what counts entities."""
        return EntityScores(tokens, names)

    def averaged(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Leave the loss: a mean of F1s is not the F1 of all texts together."""
        return {"loss": scores["loss"]}

    def told(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Leave out what texts without an entity cannot say: their F1 would be 0, however good the model."""
        there = any(value for name, value in scores.items() if name.startswith("texts/"))
        return super().told(scores) if there else self.averaged(scores)

    def answers(
        self, corpus: Corpus, tokens: Tokens, logits: Sequence[torch.Tensor], names: Sequence[str]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return ``entities`` of each text: ``label``, ``start``, ``end`` and ``text`` in characters."""
        found = []
        assert tokens.places is not None
        for text in tokens.texts().tolist():
            words, tags = [], []
            for row in tokens.rows_of(text):
                start = tokens.starts[row]
                places = tokens.places[start : start + tokens.lengths[row]]
                spots = np.flatnonzero(places[:, 1])
                words += places[spots].tolist()
                tags += [names[tag] for tag in logits[row].argmax(-1)[spots].tolist()]
            spans = [(words[first][0], words[last][1], kind) for first, last, kind in entities(tags)]
            listed = [
                {"label": kind, "start": start, "end": end, "text": corpus.texts[text][start:end]}
                for start, end, kind in spans
            ]
            found.append((text, {"entities": listed}))
        return found

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return the text with its entities in brackets."""
        text, shown, end = str(answer["text"]), "", 0
        for one in answer["entities"]:
            shown += f"{text[end : one['start']]}[{one['text']}: {one['label']}]"
            end = one["end"]
        return shown + text[end:]


TASKS = (TokenTask,)


def _unanswered(row: Row, names: Mapping[str, str]) -> Row:
    """Return a row without whatever tags it has."""
    tokens = names.get("tokens", "tokens")
    if tokens in row.columns:
        listed = [] if absent(row.columns[tokens]) else structured(row, tokens, list)
        without: dict[str, Any] = {names.get("tags", "tags"): [_NONE] * len(listed)}
    else:
        without = {names.get("spans", "spans"): []}
    return row.supposing(without)


def _first_tokens(tokens: np.ndarray[Any, Any], words: np.ndarray[Any, Any]) -> tuple[Indices, Indices]:
    """Return which words have a first token of their own, and which one.

    Args:
        tokens: first character of each token and the one behind its last, in order; (0, 0) is nothing.
        words: likewise of each word.
    """
    real = np.flatnonzero(tokens[:, 1] > 0)
    nearest = np.searchsorted(tokens[real, 1], words[:, 0], side="right")
    there = np.flatnonzero(nearest < len(real))
    spots = real[nearest[there]]
    there, spots = (kept[tokens[spots, 0] < words[there, 1]] for kept in (there, spots))
    # A token that holds the ends of one word and all of the next is the first one's.
    spots, first = np.unique(spots, return_index=True)
    return there[first], spots
