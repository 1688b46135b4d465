"""Texts from memory: rows as programs have them, checked, and written where a run finds them again.

A run must be able to go on in another process, so what it was given lies in its folder as jsonl.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.config import DataConfig, RunConfig
from fedllm.data.corpus import Reader, load
from fedllm.data.reading import Row, read_rows, with_class_names
from fedllm.errors import DataError

__all__ = ["check", "is_several_splits", "rows", "write"]


def rows(given: Any, name: str) -> list[Row]:
    """Return texts from memory as rows.

    Args:
        given: a sequence of mappings, a pandas frame, a ``datasets.Dataset``, or the path of a file.
        name: what to call it in messages, and the file of its rows.

    Raises:
        DataError: it is none of these, or there is nothing in it.

    >>> rows([{"text": "a", "label": np.int64(1)}], "data")
    [Row(columns={'text': 'a', 'label': 1}, file='data', where='data, row 1')]
    """
    if isinstance(given, str | Path):
        found = [Row(row.columns, name, row.where) for row in read_rows(DataConfig(path=str(given)))]
    else:
        found = [
            Row({str(key): _plain(value) for key, value in columns.items()}, name, f"{name}, row {number}")
            for number, columns in enumerate(_mappings(given, name), start=1)
        ]
    if not found:
        raise DataError(f"{name}: there is no row in it")
    return found


def is_several_splits(given: Any) -> bool:
    """Whether something is a ``datasets.DatasetDict``, which is a mapping but no settings."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(given, datasets.DatasetDict | datasets.IterableDatasetDict)


def _mappings(given: Any, name: str) -> Iterator[Mapping[Any, Any]]:
    """Yield rows of whatever programs keep tables in; a library is asked only where it is in use."""
    if (pandas := sys.modules.get("pandas")) and isinstance(given, pandas.DataFrame):
        yield from given.astype(object).where(given.notna(), None).to_dict("records")
        return
    if is_several_splits(given):
        raise DataError(f"{name} is several splits ({', '.join(given)}): give one of them")
    if (datasets := sys.modules.get("datasets")) and isinstance(given, datasets.Dataset):
        yield from with_class_names(given)
        return
    wanted = "rows are wanted: a list of dicts, a pandas frame or a datasets.Dataset"
    if isinstance(given, Mapping | bytes) or not isinstance(given, Iterable):
        raise DataError(f"{name} is of type {type(given).__name__}, but {wanted}")
    for number, row in enumerate(given, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {number} is of type {type(row).__name__}, but {wanted}")
        yield row


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, inside lists too: numpy's as Python's, what is no number as nothing."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and value != value else value


def check(
    config: RunConfig, task: Reader, train: Iterable[Row] | None, test: Iterable[Row] | None = None
) -> None:
    """See that texts can be read as a run is going to read them.

    Args:
        config: the run.
        task: the run's.
        train: its texts; None where they lie where the configuration says.
        test: a test set of its own.

    Raises:
        DataError: as :func:`fedllm.data.corpus.load`.
    """
    logger = logging.getLogger("fedllm")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what is remarkable is said once, when the run reads its files
    try:
        read = load(config.data, task, config.data.classes or None, train)
        if test is not None:
            where = config.data.model_copy(update={"partition": "iid"})
            load(where, task, read.label_names or None, test)
    finally:
        logger.setLevel(level)


def write(given: Sequence[Row], config: DataConfig, roles: Iterable[str], path: Path) -> None:
    """Write rows that passed :func:`check` as jsonl: the columns that the run reads, and no others.

    Args:
        given: the rows.
        config: names columns.
        roles: the task's further columns, by its own names.
        path: of the file.
    """
    wanted = {value for value in config.model_dump().values() if isinstance(value, str)}
    wanted |= {config.columns.get(role, role) for role in roles}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in given:
            columns = {name: value for name, value in row.columns.items() if name in wanted}
            file.write(json.dumps(columns, allow_nan=False) + "\n")
