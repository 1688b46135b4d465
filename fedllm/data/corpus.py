"""Texts: loaded, split and shared out among clients."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedllm.config import DataConfig
from fedllm.data.bundled import CORPORA
from fedllm.data.columns import belonging, identity, label
from fedllm.data.labels import Label, known, numbered
from fedllm.data.partition import Indices, by_group, by_label, iid, table
from fedllm.data.reading import Row, read_rows
from fedllm.errors import DataError
from fedllm.randomness import stream

__all__ = [
    "Corpus",
    "Example",
    "Reader",
    "hold_out",
    "load",
    "load_test",
    "partition",
    "partition_table",
    "split",
]

logger = logging.getLogger(__name__)


class Example(NamedTuple):
    """What a task makes of one row.

    Attributes:
        text: what the example is known and shown by; copies of it stay on one side of a split.
        label: its class, where it has exactly one.
        parts: whatever else the task reads, as JSON could hold it.
        key: examples of one key stay on one side of a split; unset takes the text.
        where: file and line, for messages; whoever reads rows fills it in.
    """

    text: str
    label: Label | None = None
    parts: Any = None
    key: str | None = None
    where: str = ""


class Reader(Protocol):
    """The half of a task (:class:`fedllm.tasks.Task`) that knows its columns."""

    def read(self, row: Row, config: DataConfig) -> Example | None:
        """Return what a row holds, or nothing where there is no text in it."""

    def number(
        self, examples: Sequence[Example], names: tuple[str, ...] | None
    ) -> tuple[Indices | None, tuple[str, ...]]:
        """Return each example's class number, where it has one, and the names of all outputs."""


@dataclass(frozen=True)
class Corpus:
    """Texts with what is known of them.

    Attributes:
        texts: the texts.
        labels: int64 class numbers, or ``None`` where the texts have no class.
        label_names: class names in the order of the numbers.
        groups: whose text each is (identity column or file), or ``None``.
        numbers: which of the texts that were read these are, from 0; ``None`` means all of them.
        parts: what else the task reads of each, or ``None`` where a text is all there is.
        keys: texts of one key stay on one side of a split; ``None`` takes the texts themselves.
        where: the place of each in the data, for messages; ``None`` where they come from none.
    """

    texts: list[str]
    labels: Indices | None
    label_names: tuple[str, ...]
    groups: list[str] | None
    numbers: Indices | None = None
    parts: list[Any] | None = None
    keys: list[str] | None = None
    where: list[str] | None = None

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
            np.array(chosen, dtype=np.int64) if self.numbers is None else self.numbers[chosen],
            None if self.parts is None else [self.parts[i] for i in chosen],
            None if self.keys is None else [self.keys[i] for i in chosen],
            None if self.where is None else [self.where[i] for i in chosen],
        )

    def place(self, index: int) -> str:
        """Return where a text is from, for a message."""
        return f"text {index}" if self.where is None else self.where[index]


def load(
    config: DataConfig,
    task: Reader,
    labels: tuple[str, ...] | None = None,
    rows: Iterable[Row] | None = None,
) -> Corpus:
    """Read the configured texts.

    Args:
        config: where they are and what their columns are called.
        task: knows which columns to read, and what is in them.
        labels: class names of the whole federation, in the order of their numbers, where the texts are one
            client's own and may lack some classes; otherwise the classes found here are numbered.
        rows: the texts, where they are at hand; otherwise they are read from where ``config`` says.

    Raises:
        DataError: a column is missing or a row is not readable; names file, line and what would be right.
    """
    by_class = config.partition in ("dirichlet", "pathological")
    if by_class and config.label is None:
        raise DataError(
            f'data.partition = "{config.partition}" needs data.label, the column that holds the class'
        )
    examples: list[Example] = []
    classes: list[Label] = []
    groups: list[str] = []
    changed: dict[str, Label] = {}
    without = 0
    for row in read_rows(config) if rows is None else rows:
        example = _read(task, row, config, bundled=rows is None and config.path is None)
        if example is None:
            without += 1
            continue
        found = example.label
        if by_class and found is None:
            found = _shared_out_by(row, config)
        if found is not None:
            classes.append(found)
            written = row.columns[str(config.label)]
            if isinstance(written, str) and written != found:
                changed[written] = found
        if config.group is not None:
            example = example._replace(key=belonging(row, config.group))
        examples.append(example._replace(where=row.where))
        if config.partition == "natural":
            groups.append(identity(row, str(config.by)))
        elif config.partition == "file":
            groups.append(row.file)
    if without:
        logger.warning("%d rows without text, or with nothing to learn in them, were left out", without)
    for before, after in list(changed.items())[:1]:
        logger.warning(
            "labels differ from what is seen of them (%d do): %r is read as %r", len(changed), before, after
        )
    if not examples:
        raise DataError(f"{config.path or config.name}: there is no text in it, or nothing to learn")
    return _gathered(examples, classes, groups, task, labels)


def _shared_out_by(row: Row, config: DataConfig) -> Label:
    """Return the class by which a row is shared out, where its task asks for none."""
    try:
        return label(row, str(config.label))
    except DataError as error:
        raise DataError(
            f'{error}; data.partition = "{config.partition}" shares texts out by class, "iid" needs none'
        ) from None


def _read(task: Reader, row: Row, config: DataConfig, *, bundled: bool) -> Example | None:
    """Read a row; that a task finds nothing in the bundled texts is no fault of their file."""
    try:
        return task.read(row, config)
    except DataError as error:
        if bundled and config.name in CORPORA:
            raise DataError(f"data.name = {config.name!r}: {error}; data.path names other texts") from None
        raise


def _gathered(
    examples: list[Example],
    classes: list[Label],
    groups: list[str],
    task: Reader,
    labels: tuple[str, ...] | None,
) -> Corpus:
    numbers, names = task.number(examples, labels)
    if numbers is None and classes:
        if names:
            raise DataError(
                'a partition by class needs a task that gives every text one class; "iid" needs none'
            )
        numbers, names = numbered(classes) if labels is None else (known(classes, labels), labels)
    return Corpus(
        [example.text for example in examples],
        numbers,
        names,
        groups or None,
        parts=None if all(e.parts is None for e in examples) else [e.parts for e in examples],
        keys=None
        if all(e.key is None for e in examples)
        else [e.text if e.key is None else e.key for e in examples],
        where=[example.where for example in examples],
    )


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Hold out a share of the texts, in the same mix of classes, as (train, test).

    Copies of one text stay on one side, or what ``data.group`` says belongs together, so that the test set
    holds nothing that was trained on (98 of the 2,225 BBC articles are copies). Of texts in groups every
    group gives its share, rounded up, and keeps a text at least: how many clients a natural partition has
    does not depend on the seed.

    Raises:
        DataError: a class has a single text, or nothing can be held out.
    """
    labels = np.zeros(len(corpus), dtype=np.int64) if corpus.labels is None else corpus.labels
    counts = np.bincount(labels)
    for number in np.flatnonzero(counts == 1):
        name = corpus.label_names[number] if corpus.label_names else "text"
        raise DataError(
            f"class {name!r} has a single text and cannot be on both sides of the split; add or drop it"
        )
    shares = _apportion(counts, fraction)
    owners = np.zeros(len(corpus), dtype=np.int64)
    if corpus.groups is not None:
        owners = np.unique(np.asarray(corpus.groups, dtype=object).astype(str), return_inverse=True)[1]
    sizes = np.bincount(owners)
    spare = sizes - 1 if corpus.groups is None else np.minimum(np.ceil(sizes * fraction), sizes - 1)
    rank = stream(seed, "split").permutation(len(corpus))
    keys = corpus.texts if corpus.keys is None else corpus.keys
    copies: dict[str, list[int]] = {}
    for index in np.argsort(rank):
        copies.setdefault(keys[index], []).append(int(index))
    test: list[int] = []
    for same in copies.values():
        taken = np.bincount(labels[same], minlength=len(shares))
        given = np.bincount(owners[same], minlength=len(spare))
        if (taken <= shares).all() and (given <= spare).all():
            shares -= taken
            spare = spare - given
            test.extend(same)
    _require_share(len(test), fraction, corpus, len(copies))
    train = np.setdiff1d(np.arange(len(corpus)), test)
    return corpus.subset(train), corpus.subset(sorted(test))


def _require_share(held: int, fraction: float, corpus: Corpus, distinct: int) -> None:
    """Say it where rounding, copies or small classes and groups leave another share than was asked for."""
    wanted = fraction * len(corpus)
    asked = f"data.test_fraction = {fraction:g} of {len(corpus)} texts"
    if not held:
        different = f" ({distinct} of them differ)" if distinct < len(corpus) else ""
        raise DataError(f"{asked}{different} leaves none to test on; raise it, or name a data.test_path")
    if abs(held - wanted) > max(2.0, wanted / 5):
        logger.warning(
            "%s would hold out %.0f, but small classes, groups or copies make it %d", asked, wanted, held
        )


def load_test(config: DataConfig, task: Reader, train: Corpus) -> Corpus:
    """Read the test set from ``data.test_path``; its classes are those of the training texts.

    Raises:
        DataError: as :func:`load`, and where a label is none of the training texts' classes.
    """
    where = config.model_copy(update={"path": config.test_path, "partition": "iid"})
    try:
        test = load(where, task, train.label_names or None)
    except DataError as error:
        raise DataError(f"data.test_path: {error}") from error
    if both := len(set(test.texts) & set(train.texts)):
        logger.warning("%d texts of data.test_path are among the training texts too", both)
    return test


def hold_out(
    part: Indices, fraction: float, seed: int, client: int, keys: Sequence[str] | None = None
) -> tuple[Indices, Indices]:
    """Split one client's own texts as (train, test); train keeps at least one text.

    Args:
        part: the client's texts.
        fraction: of them, for the test.
        seed: the run's.
        client: its number.
        keys: what each text belongs to, where texts that belong together stay on one side.

    Raises:
        DataError: whatever belongs together is more than is to be held out.

    >>> [len(side) for side in hold_out(np.arange(10), 0.2, seed=0, client=3)]
    [8, 2]
    """
    count = min(round(fraction * len(part)), len(part) - 1)
    order = stream(seed, "client split", client).permutation(len(part))
    together: dict[str | int, list[int]] = {}
    for place in order:
        together.setdefault(int(place) if keys is None else keys[place], []).append(int(place))
    held = np.zeros(len(part), dtype=np.bool_)
    for same in together.values():
        if held.sum() + len(same) <= count:
            held[same] = True
    if count and not held.any():
        raise DataError(
            f"client {client} has {len(part)} texts and none to hold out: what belongs together (data.group) "
            f"is more than data.client_test_fraction = {fraction:g} of them; raise it"
        )
    return np.sort(part[~held]), np.sort(part[held])


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


def _apportion(counts: Indices, fraction: float) -> Indices:
    """Texts to hold out of each class: at least one and not all, and the right total (largest remainder)."""
    exact = counts * fraction
    shares = np.floor(exact).astype(np.int64)
    missing = math.floor(counts.sum() * fraction + 0.5) - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    clipped: Indices = np.minimum(np.maximum(shares, np.minimum(1, counts)), np.maximum(counts - 1, 0))
    return clipped
