"""Telling which of several classes a text is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedllm.data.columns import column, label, text
from fedllm.data.corpus import Example
from fedllm.data.labels import known, numbered
from fedllm.data.reading import Row
from fedllm.errors import ConfigError, DataError
from fedllm.tasks.base import Distribution, Scorer, Task
from fedllm.tasks.metrics import classified, means, several

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.labels import Label
    from fedllm.data.partition import Indices
    from fedllm.data.tokens import Overlong, Tokens

__all__ = ["SEVERAL", "Classification", "encode_texts"]


SEVERAL = "several of"
"""The first name where texts may have any number of the classes that follow."""


class _Classes(Scorer):
    """Decides by the mean of the logits of a text's rows."""

    def __init__(self, tokens: Tokens, names: Sequence[str]) -> None:
        assert tokens.labels is not None
        owners = np.arange(len(tokens)) if tokens.owners is None else tokens.owners
        _, first, self.texts = np.unique(owners, return_index=True, return_inverse=True)
        self.actual, self.names = tokens.labels[first], names
        self.sums = np.zeros((len(first), len(names)))

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        np.add.at(self.sums, self.texts[rows], logits.cpu().numpy())

    def scores(self, loss: float) -> dict[str, float]:
        return classified(self.actual, self.sums.argmax(-1), self.names)


class _Sets(_Classes):
    """Several classes for each text: the share of texts with exactly the right ones, F1 by class."""

    def scores(self, loss: float) -> dict[str, float]:
        return several(self.actual > 0.5, self.sums > 0, self.names)


class Classification(Task):
    """One class for each text, or for two texts; several, where ``data.label`` holds lists.

    Where texts have several classes, the first one of the outputs' names is :data:`SEVERAL`, so that whoever
    knows the names knows that too.
    """

    name: ClassVar[str] = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc")
    pipeline: ClassVar[str] = "text-classification"
    classed: ClassVar[bool] = True
    pairs: ClassVar[bool] = True

    def misfit(self) -> str | None:
        """There must be a column of classes."""
        if self.config.data.label is not None:
            return None
        return f'model.task = "{self.name}" needs data.label, the column that holds the class'

    @property
    def closed_form(self) -> bool:
        """Whether the head is ours, and a text has one class as far as is known."""
        return self.pooling != "own" and self.config.data.classes[:1] != (SEVERAL,)

    @property
    def weighs(self) -> bool:
        """Whether the loss is the one below; a task that is built on this one has its own."""
        return type(self).loss is Classification.loss

    def outputs(self, names: Sequence[str]) -> int:
        """Return the number of classes.

        Raises:
            ConfigError: there are more or fewer weights than classes.
        """
        weights = self.config.training.class_weights
        classes = self.classes(names)
        if not isinstance(weights, str) and len(weights) != len(classes):
            raise ConfigError(
                f"training.class_weights lists {len(weights)} weights for {len(classes)} classes: give one "
                f"for each of {', '.join(classes)}"
            )
        return len(classes)

    @property
    def overlong(self) -> tuple[Overlong, ...]:
        """Everything, unless a task that is built on this one makes tokens of its own, or texts are two."""
        plain = type(self).encode is Classification.encode and self.config.data.pair is None
        return ("truncate", "split", "drop") if plain else ("truncate",)

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's text, its second text where there is one, and its class or classes."""
        found = text(row, config.text)
        second = None if config.pair is None else text(row, config.pair, "data.pair")
        if found is None or (config.pair is not None and second is None):
            return None
        pair = {} if second is None else {"pair": second}
        if not answered:
            return Example(found, parts=pair or None)
        given = column(row, str(config.label), "data.label")
        if isinstance(given, list):
            return Example(found, parts={**pair, "classes": [_one_of(row, config, one) for one in given]})
        return Example(found, label(row, str(config.label)), pair or None)

    def number(
        self, examples: Sequence[Example], names: tuple[str, ...] | None
    ) -> tuple[Indices | None, tuple[str, ...]]:
        """Number the classes by value or alphabet, unless the federation has."""
        raw: list[Label] = [example.label for example in examples if example.label is not None]
        if len(raw) == len(examples) and (names is None or names[0] != SEVERAL):
            return numbered(raw) if names is None else (known(raw, names), names)
        if raw:
            odd = next(example for example in examples if example.label is None)
            raise DataError(
                f"{odd.where}: data.label holds a list of classes, and in other rows one class, such as "
                f"{raw[0]!r}: write lists of one"
            )
        every = [one for example in examples for one in example.parts["classes"]]
        if names is None:
            return None, (SEVERAL, *numbered(every)[1])
        if names[0] != SEVERAL:
            raise DataError(
                "data.label holds lists of classes, and the federation's texts have one class each"
            )
        known(every, names[1:])
        return None, names

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """Leave out what is no class."""
        return tuple(names[1:] if names[:1] == (SEVERAL,) else names)

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Make of every text what ``data.overlong`` says; of two texts the longer one is cut first.

        Raises:
            DataError: as :func:`fedllm.data.tokens.encode`, or the texts have no classes.
        """
        tokens = encode_texts(corpus, tokenizer, max_length, self.config.data.overlong)
        names, parts = corpus.label_names, corpus.parts
        if names[:1] == (SEVERAL,):
            labels = np.zeros((len(corpus), len(names) - 1), dtype=np.float32)
            for index, part in enumerate(parts or []):
                labels[index, known((part or {}).get("classes", []), names[1:])] = 1.0
            return replace(tokens, labels=labels if tokens.owners is None else labels[tokens.owners])
        if corpus.labels is None:
            raise DataError("texts to classify need classes; set data.label")
        return tokens

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean cross-entropy over texts, each times the weight of its class.

        Where a text may have several classes, each class is a question of its own, and the mean is over
        texts and classes.

        The mean is over texts and not over weights: the clients' losses, weighted by their texts, add up to
        that of all texts, and one who holds a single class keeps its weight.
        """
        from torch.nn import functional

        training = self.config.training
        smoothing = training.label_smoothing
        if training.class_weights == "none" and labels.dim() == 2:
            smoothed = labels * (1 - smoothing) + smoothing / 2
            return functional.binary_cross_entropy_with_logits(logits, smoothed)
        if training.class_weights == "none":
            return functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        if isinstance(training.class_weights, str):
            raise ConfigError(
                f'training.class_weights = "{training.class_weights}" stands for numbers that fedllm '
                "simulate and fedllm run find when they start a run: start it so, or list the numbers"
            )
        weights = logits.new_tensor(training.class_weights)
        if labels.dim() == 2:
            smoothed = labels * (1 - smoothing) + smoothing / 2
            return functional.binary_cross_entropy_with_logits(logits, smoothed, weight=weights)
        weights = weights[labels]
        losses = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return (losses * weights).mean()

    def parametrises(self, labels: torch.Tensor) -> Distribution:
        """Several classes are several questions."""
        return "bernoulli" if labels.dim() == 2 else "categorical"

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what counts hits and misses by class; see :func:`fedllm.tasks.metrics.classified`."""
        if tokens.labels is not None and tokens.labels.ndim == 2:
            return _Sets(tokens, self.classes(tuple(names)))
        return _Classes(tokens, names)

    def averaged(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Leave out what no mean over clients gives back."""
        return means(scores)

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return class, probability and text; of several classes, those that are likelier than not."""
        if "labels" in answer:
            return f"{', '.join(answer['labels']) or '-'}\t{answer['text']}"
        return f"{answer['label']}\t{answer['probabilities'][answer['label']]:.3f}\t{answer['text']}"

    def answer(self, logits: torch.Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the likeliest class as ``label``, and ``probabilities`` by class.

        Where texts have several classes, ``labels`` are those that are likelier than not.
        """
        found: list[dict[str, Any]] = []
        if tuple(names[:1]) == (SEVERAL,):
            for row in logits.sigmoid().cpu().tolist():
                by_name = dict(zip(names[1:], row, strict=True))
                chosen = [name for name, probability in by_name.items() if probability > 0.5]
                found.append({"labels": chosen, "probabilities": by_name})
            return found
        for row in logits.softmax(-1).cpu().tolist():
            best = max(range(len(row)), key=row.__getitem__)
            found.append({"label": names[best], "probabilities": dict(zip(names, row, strict=True))})
        return found


TASKS = (Classification,)


def encode_texts(corpus: Corpus, tokenizer: Any, max_length: int, overlong: Overlong = "truncate") -> Tokens:
    """Tokenise texts, each with its ``pair`` where its parts hold one.

    Raises:
        DataError: as :func:`fedllm.data.tokens.encode`.
    """
    from fedllm.data.tokens import encode, encode_pairs

    pairs = [part.get("pair") for part in corpus.parts or [] if part]
    if not pairs or pairs[0] is None:
        return encode(corpus, tokenizer, max_length, overlong)
    return encode_pairs(corpus, pairs, tokenizer, max_length)


def _one_of(row: Row, config: DataConfig, value: Any) -> Label:
    name = str(config.label)
    return label(Row({name: value}, row.file, row.where), name)
