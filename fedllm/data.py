"""Texts: loaded, split, shared out among clients, tokenised and batched."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fedllm.config import DataConfig
from fedllm.errors import DataError
from fedllm.partition import Indices, by_group, by_label, iid, table
from fedllm.randomness import stream
from fedllm.reading import Row, read_rows

__all__ = [
    "Batch",
    "Corpus",
    "Tokens",
    "hold_out",
    "load",
    "partition",
    "partition_table",
    "split",
    "tokenise",
]

IGNORED = -100
"""The label of a token that is not predicted."""

WINDOW = 8
"""Characters per wanted token that are looked at first; English has four to five."""

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Padded texts.

    Attributes:
        input_ids: [b, t] int64.
        attention_mask: [b, t] int64, 1 where there is text.
        labels: [b] int64 class numbers, or [b, t] int64 token numbers with -100 at padding (causal).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Corpus:
    """Texts with what is known of them.

    Attributes:
        texts: the texts.
        labels: int64 class numbers, or ``None`` where the texts have no class.
        label_names: class names in the order of the numbers.
        groups: whose text each is (identity column or file), or ``None``.
    """

    texts: list[str]
    labels: Indices | None
    label_names: tuple[str, ...]
    groups: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, indices: Iterable[int]) -> Corpus:
        """Return the texts at ``indices``, in that order; class names stay complete."""
        chosen = [int(i) for i in indices]
        return Corpus(
            [self.texts[i] for i in chosen],
            None if self.labels is None else self.labels[chosen],
            self.label_names,
            None if self.groups is None else [self.groups[i] for i in chosen],
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised texts: one flat int32 array, and where in it each text lies.

    Subsets share the array, so that thousands of clients cost a few bytes per text.
    """

    flat: np.ndarray[Any, np.dtype[np.int32]]
    starts: Indices
    lengths: Indices
    labels: Indices | None
    padding: int
    task: str

    def __len__(self) -> int:
        return len(self.starts)

    def subset(self, indices: Indices | Sequence[int]) -> Tokens:
        """Return the texts at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return Tokens(self.flat, self.starts[chosen], self.lengths[chosen], labels, self.padding, self.task)

    def batch(self, indices: Indices | Sequence[int]) -> Batch:
        """Return the texts at ``indices`` as tensors, padded on the right to the longest of them."""
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        columns = np.arange(lengths.max(initial=1))
        mask = columns < lengths[:, None]
        # Positions beyond a text's end are clipped into the array; the mask overwrites what they pick up.
        places = np.minimum(self.starts[chosen][:, None] + columns, max(len(self.flat) - 1, 0))
        ids = np.where(mask, self.flat[places], self.padding).astype(np.int64)
        if self.task == "causal":
            labels = np.where(mask, ids, IGNORED)
        else:
            assert self.labels is not None
            labels = self.labels[chosen]
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(labels))


def load(config: DataConfig, task: str, labels: tuple[str, ...] | None = None) -> Corpus:
    """Read the configured texts.

    Args:
        config: where they are and what their columns are called.
        task: ``classification`` needs a label on every row; ``causal`` takes labels only if they are there,
            and then for the partition.
        labels: class names of the whole federation, in the order of their numbers, where the texts are one
            client's own and may lack some classes; otherwise the classes found here are numbered.

    Raises:
        DataError: a column is missing or a row is not readable; names file, line and what would be right.
    """
    by_class = config.partition in ("dirichlet", "pathological")
    required = task == "classification" or by_class
    if by_class and config.label is None:
        raise DataError(
            f'data.partition = "{config.partition}" needs data.label, the column that holds the class'
        )
    texts: list[str] = []
    raw: list[str | int] = []
    groups: list[str] = []
    blank = 0
    label = config.label
    for row in read_rows(config):
        text = _column(row, config.text, "data.text")
        if not isinstance(text, str):
            raise DataError(f"{row.where}: column {config.text!r} is not text but {_kind(text)}")
        if not text.strip():
            blank += 1
            continue
        if label is not None and not required and label not in row.columns:
            label = None
        texts.append(text)
        if label is not None:
            raw.append(_label(row, label))
        if config.partition == "natural":
            groups.append(_group(row, str(config.by)))
        elif config.partition == "file":
            groups.append(row.file)
    if blank:
        logger.warning("%d rows without text were left out", blank)
    if not texts:
        raise DataError(f"{config.path or config.name}: there is no text in it")
    if label is None:
        return Corpus(texts, None, (), groups or None)
    if len(raw) != len(texts):
        raise DataError(f"column {config.label!r} (data.label) is on some rows only")
    numbers, names = _numbered(raw) if labels is None else (_known(raw, labels), labels)
    return Corpus(texts, numbers, names, groups or None)


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Hold out a share of the texts, in the same mix of classes, as (train, test).

    Copies of one text stay on one side, so that the test set holds nothing that was trained on (98 of the
    2,225 BBC articles are copies).

    Raises:
        DataError: a class has a single text, or there are fewer than two texts.
    """
    labels = np.zeros(len(corpus), dtype=np.int64) if corpus.labels is None else corpus.labels
    counts = np.bincount(labels)
    for number in np.flatnonzero(counts == 1):
        name = corpus.label_names[number] if corpus.label_names else "text"
        raise DataError(
            f"class {name!r} has a single text and cannot be on both sides of the split; add or drop it"
        )
    shares = _apportion(counts, fraction)
    rank = stream(seed, "split").permutation(len(corpus))
    copies: dict[str, list[int]] = {}
    for index in np.argsort(rank):
        copies.setdefault(corpus.texts[index], []).append(int(index))
    test: list[int] = []
    for same in copies.values():
        taken = np.bincount(labels[same], minlength=len(shares))
        if (taken <= shares).all():
            shares -= taken
            test.extend(same)
    if not test:
        raise DataError(f"data.test_fraction = {fraction:g} of {len(corpus)} texts leaves none to test on")
    train = np.setdiff1d(np.arange(len(corpus)), test)
    return corpus.subset(train), corpus.subset(sorted(test))


def hold_out(part: Indices, fraction: float, seed: int, client: int) -> tuple[Indices, Indices]:
    """Split one client's own texts as (train, test); train keeps at least one text.

    >>> [len(side) for side in hold_out(np.arange(10), 0.2, seed=0, client=3)]
    [8, 2]
    """
    count = min(round(fraction * len(part)), len(part) - 1)
    order = stream(seed, "client split", client).permutation(len(part))
    return np.sort(part[order[count:]]), np.sort(part[order[:count]])


def partition(train: Corpus, config: DataConfig, clients: int, seed: int) -> list[Indices]:
    """Return each client's texts as sorted indices into ``train``; no client is left empty.

    Raises:
        DataError: the texts cannot be shared out as asked; says what to change.
    """
    if config.partition == "iid":
        return iid(len(train), clients, seed)
    if config.partition in ("natural", "file"):
        key = f"data.by = {config.by!r}" if config.partition == "natural" else 'data.partition = "file"'
        if train.groups is None:
            raise DataError(f"{key}: the texts were loaded without their groups")
        return by_group(train.groups, clients, key)
    if train.labels is None:
        raise DataError(f'data.partition = "{config.partition}" needs texts with a class')
    return by_label(train.labels, config, clients, seed)


def partition_table(train: Corpus, parts: list[Indices]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count texts by client and class: [clients, classes], or [clients, 1] for texts without classes."""
    return table(parts, train.labels, len(train.label_names))


def tokenise(corpus: Corpus, tokenizer: Any, max_length: int, task: str) -> Tokens:
    """Turn every text into at most ``max_length`` token numbers, once.

    Raises:
        DataError: texts to classify have no classes, or a text has no token.
    """
    if task == "classification" and corpus.labels is None:
        raise DataError("texts to classify need classes; set data.label")
    ids = _encode(corpus.texts, tokenizer, max_length)
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    if len(lengths) and lengths.min() == 0:
        raise DataError(
            f"text {int(lengths.argmin())} has no token: {corpus.texts[int(lengths.argmin())][:60]!r}"
        )
    flat = np.fromiter((token for text in ids for token in text), dtype=np.int32, count=int(lengths.sum()))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if len(ids) else lengths
    return Tokens(flat, starts, lengths, corpus.labels, int(tokenizer.pad_token_id), task)


def _encode(texts: list[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Tokenise only the beginnings of long texts: the rest would be computed and thrown away.

    Tokenizers never look across a space, so the tokens of a text cut at one are those of the whole text;
    where the beginning falls short of ``max_length`` tokens, the whole text is taken after all.
    """

    def encode(some: list[str]) -> list[list[int]]:
        settings = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        ids: list[list[int]] = tokenizer(some, **settings)["input_ids"] if some else []
        return ids

    if tokenizer.truncation_side != "right":
        return encode(texts)
    beginnings = [_beginning(text, WINDOW * max_length) for text in texts]
    ids = encode(beginnings)
    short = [
        i for i, tokens in enumerate(ids) if len(tokens) < max_length and len(beginnings[i]) < len(texts[i])
    ]
    for i, tokens in zip(short, encode([texts[i] for i in short]), strict=True):
        ids[i] = tokens
    return ids


def _beginning(text: str, length: int) -> str:
    """Cut a text at the first space from ``length`` characters on, if there is one."""
    end = text.find(" ", length)
    return text if end < 0 else text[:end]


def _column(row: Row, name: str, key: str) -> Any:
    if name not in row.columns:
        have = ", ".join(map(str, row.columns)) or "none"
        raise DataError(f"{row.where}: there is no column {name!r} ({key}); the columns are {have}")
    return row.columns[name]


def _label(row: Row, name: str) -> str | int:
    value = _column(row, name, "data.label")
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int):
        return int(value)
    raise DataError(
        f"{row.where}: column {name!r} must hold a class, a text or a whole number, not {_kind(value)}"
    )


def _group(row: Row, name: str) -> str:
    value = _column(row, name, "data.by")
    if value is None or value == "":
        raise DataError(f"{row.where}: column {name!r} (data.by) is empty")
    return str(value)


def _kind(value: Any) -> str:
    return "empty" if value in (None, "") else f"{type(value).__name__} {str(value)[:40]}"


def _numbered(raw: list[str | int]) -> tuple[Indices, tuple[str, ...]]:
    """Number the classes: whole numbers by value, names by alphabet."""
    if len({type(value) for value in raw}) > 1:
        raise DataError("the label column mixes whole numbers and names")
    distinct: list[Any] = sorted(set(raw))
    if all(_is_fraction(value) for value in distinct):
        raise DataError(f"the label column holds fractions such as {distinct[0]}; classes are wanted")
    place = {value: number for number, value in enumerate(distinct)}
    return np.array([place[value] for value in raw], dtype=np.int64), tuple(map(str, distinct))


def _known(raw: list[str | int], names: tuple[str, ...]) -> Indices:
    place = {name: number for number, name in enumerate(names)}
    if strange := sorted({str(value) for value in raw} - place.keys()):
        raise DataError(f"label {strange[0]!r} is none of the federation's classes: {', '.join(names)}")
    return np.array([place[str(value)] for value in raw], dtype=np.int64)


def _is_fraction(value: str | int) -> bool:
    try:
        return isinstance(value, str) and not float(value).is_integer()
    except (ValueError, OverflowError):
        return False


def _apportion(counts: Indices, fraction: float) -> Indices:
    """Texts to hold out of each class: at least one and not all, and the right total (largest remainder)."""
    exact = counts * fraction
    shares = np.floor(exact).astype(np.int64)
    missing = math.floor(counts.sum() * fraction + 0.5) - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    clipped: Indices = np.minimum(np.maximum(shares, np.minimum(1, counts)), np.maximum(counts - 1, 0))
    return clipped
