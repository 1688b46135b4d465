"""Rows of tokens: each text's token numbers once, subsets that share them, padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from fedllm.data.partition import Indices

__all__ = ["IGNORED", "Answering", "Batch", "Choices", "Quotable", "Tokens"]

IGNORED = -100
"""The label of a token that is not predicted."""


class Batch(NamedTuple):
    """Padded texts.

    Attributes:
        input_ids: [b, t] int64.
        attention_mask: [b, t] int64, 1 where there is text.
        labels: what is to be predicted: [b] int64 class numbers, [b, t] int64 with -100 where nothing is, or
            what else a task's loss takes.
        extra: further inputs of the model (``token_type_ids``, ...) and of the loss, by name; [b, ...] each.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    extra: Mapping[str, torch.Tensor] = MappingProxyType({})

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        ids, mask, labels = (tensor.to(device) for tensor in self[:3])
        return Batch(ids, mask, labels, {name: tensor.to(device) for name, tensor in self.extra.items()})

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what a network takes by name, what is to be predicted left out."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.extra}


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised texts: one flat int32 array, and where in it each row lies.

    Subsets share the array, so that thousands of clients cost a few bytes per text.

    Attributes:
        flat: token numbers of all texts, one after the other.
        starts, lengths: of each row in ``flat``.
        labels: what is to be predicted of each row, [rows, ...]; ``None`` where it is asked of each token.
        padding: the tokenizer's padding token.
        targets: what is to be predicted of each token, parallel to ``flat``; -100 where nothing is.
        segments: which part of a text each token is in, parallel to ``flat``; ``None`` where there is one.
        owners: which text each row is of, where a text may be several rows or none; ``None`` where each is
            one.
        cut: whether each row is a text whose end was cut off, [rows] bool; ``None`` where nobody looked.
        places: where in its text each token lies, parallel to ``flat``: [tokens, 2] first character and the
            one behind the last, (0, 0) of tokens that stand for nothing in it; ``None`` where nobody asks.
        aside: what else is known of each row, by name; [rows, ...] each.
    """

    flat: np.ndarray[Any, np.dtype[np.int32]]
    starts: Indices
    lengths: Indices
    labels: np.ndarray[Any, Any] | None
    padding: int
    targets: np.ndarray[Any, np.dtype[np.int32]] | None = None
    segments: np.ndarray[Any, np.dtype[np.int8]] | None = None
    owners: Indices | None = None
    cut: np.ndarray[Any, np.dtype[np.bool_]] | None = None
    places: np.ndarray[Any, np.dtype[np.int32]] | None = None
    aside: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    single: ClassVar[bool] = True
    """Whether a row is one sequence of tokens, which is all that a model reads of it."""

    def __len__(self) -> int:
        return len(self.starts)

    def subset(self, rows: Indices | Sequence[int]) -> Self:
        """Return these rows, in that order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            owners=None if self.owners is None else self.owners[chosen],
            cut=None if self.cut is None else self.cut[chosen],
            aside={name: values[chosen] for name, values in self.aside.items()},
        )

    def of_texts(self, texts: Indices | Sequence[int]) -> Self:
        """Return all rows of these texts: in the order of the texts where each is one row."""
        if self.owners is None:
            return self.subset(texts)
        return self.subset(np.flatnonzero(np.isin(self.owners, texts)))

    def texts(self) -> Indices:
        """Return which texts the rows are of, each once, from the lowest number."""
        return np.arange(len(self)) if self.owners is None else np.unique(self.owners)

    def texts_of(self, rows: Indices) -> Indices:
        """Return which texts these rows are of, each once, from the lowest number."""
        return np.unique(rows if self.owners is None else self.owners[rows])

    def rows_of(self, text: int) -> list[int]:
        """Return the rows of a text, from its beginning."""
        return [text] if self.owners is None else np.flatnonzero(self.owners == text).tolist()

    def with_targets(self, targets: np.ndarray[Any, np.dtype[np.int32]]) -> Self:
        """Return the same rows, with what is to be predicted of each token."""
        return replace(self, targets=targets)

    def batch(self, rows: Indices | Sequence[int]) -> Batch:
        """Return these rows as tensors, padded on the right to the longest of them."""
        chosen = np.asarray(rows, dtype=np.int64)
        places, mask = self._places(chosen)
        ids = np.where(mask, self.flat[places], self.padding).astype(np.int64)
        if self.targets is not None:
            labels = np.where(mask, self.targets[places], IGNORED).astype(np.int64)
        else:
            assert self.labels is not None
            labels = self.labels[chosen]
        extra = {}
        if self.segments is not None:
            segments = np.where(mask, self.segments[places], 0).astype(np.int64)
            extra["token_type_ids"] = torch.from_numpy(segments)
        if self.places is not None:
            inside = mask & (self.places[places, 1] > 0)
            extra["inside"] = torch.from_numpy(inside.astype(np.int64))
        known = torch.from_numpy(mask.astype(np.int64))
        return Batch(torch.from_numpy(ids), known, torch.from_numpy(labels), extra)

    def whole(self) -> Batch:
        """Return all rows as one batch."""
        return self.batch(range(len(self)))

    def _places(self, chosen: Indices) -> tuple[Indices, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Return where in ``flat`` each token of padded rows lies, and which are no padding: [b, t] both."""
        lengths = self.lengths[chosen]
        columns = np.arange(lengths.max(initial=1))
        mask = columns < lengths[:, None]
        # Positions beyond a text's end are clipped into the array; the mask overwrites what they pick up.
        places = np.minimum(self.starts[chosen][:, None] + columns, max(len(self.flat) - 1, 0))
        return places, mask


@dataclass(frozen=True, eq=False)
class Answering(Tokens):
    """Texts, each with a second one that is to be made of it; both are cut and padded for themselves."""

    answers: Tokens | None = None

    single: ClassVar[bool] = False

    def subset(self, rows: Indices | Sequence[int]) -> Self:
        """Return these rows, in that order."""
        assert self.answers is not None
        return replace(super().subset(rows), answers=self.answers.subset(rows))

    def batch(self, rows: Indices | Sequence[int]) -> Batch:
        """Return these rows; ``labels`` and ``extra["answer_ids"]`` are the answers, -100 behind them."""
        assert self.answers is not None
        chosen = np.asarray(rows, dtype=np.int64)
        places, mask = self._places(chosen)
        ids = np.where(mask, self.flat[places], self.padding).astype(np.int64)
        wanted, known = self.answers._places(chosen)
        labels = torch.from_numpy(np.where(known, self.answers.flat[wanted], IGNORED).astype(np.int64))
        there = torch.from_numpy(mask.astype(np.int64))
        return Batch(torch.from_numpy(ids), there, labels, {"answer_ids": labels})


@dataclass(frozen=True, eq=False)
class Choices(Tokens):
    """Texts in two versions, of which the first one is better."""

    worse: Tokens | None = None

    single: ClassVar[bool] = False

    def subset(self, rows: Indices | Sequence[int]) -> Self:
        """Return these rows, in that order."""
        assert self.worse is not None
        return replace(super().subset(rows), worse=self.worse.subset(rows))

    def batch(self, rows: Indices | Sequence[int]) -> Batch:
        """Return the better versions, and behind them the worse ones: [2 b, t].

        ``extra["reference"]`` is what is known of each version, where it is.
        """
        assert self.worse is not None
        sides = [Tokens.batch(self, rows), self.worse.batch(rows)]
        ids = _stacked([side.input_ids for side in sides], self.padding)
        mask = _stacked([side.attention_mask for side in sides], 0)
        labels = _stacked([side.labels for side in sides], IGNORED)
        extra = {}
        if "reference" in self.aside:
            known = self.aside["reference"][np.asarray(rows, dtype=np.int64)]
            extra["reference"] = torch.from_numpy(np.concatenate([known[:, 0], known[:, 1]]))
        return Batch(ids, mask, labels, extra)


def _stacked(parts: Sequence[torch.Tensor], filling: int) -> torch.Tensor:
    """Stand matrices on each other, widened on the right to the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=filling) for part in parts])


@dataclass(frozen=True, eq=False)
class Quotable(Tokens):
    """Questions with texts that answers are quoted from.

    Attributes:
        contexts: the texts, by the numbers that ``owners`` has.
        wanted: what is right to quote from each; nothing where it does not say.
    """

    contexts: tuple[str, ...] = ()
    wanted: tuple[tuple[str, ...], ...] = ()
