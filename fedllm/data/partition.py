"""Who holds which text: the partitions that simulate a federation, and the table that shows them."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np

from fedllm.config import DataConfig
from fedllm.errors import DataError
from fedllm.extras import require
from fedllm.randomness import derive, stream

__all__ = ["by_group", "by_label", "iid", "table"]

Indices = np.ndarray[Any, np.dtype[np.int64]]

DRAWN = 8
"""Texts that each client draws where there are more clients than texts."""

logger = logging.getLogger(__name__)


def iid(count: int, clients: int, seed: int) -> list[Indices]:
    """Deal ``count`` shuffled texts out evenly; above one client per text, draw with replacement.

    >>> [len(part) for part in iid(10, 3, seed=0)]
    [4, 3, 3]
    """
    if clients <= count:
        order = stream(seed, "partition").permutation(count)
        return [np.sort(part) for part in np.array_split(order, clients)]
    size = min(DRAWN, count)
    logger.warning(
        "%d clients share %d texts: each draws %d of them with replacement, so clients hold the same texts",
        clients,
        count,
        size,
    )
    return [np.sort(stream(seed, "partition", k).choice(count, size, replace=False)) for k in range(clients)]


def by_group(groups: list[str], clients: int, key: str) -> list[Indices]:
    """Give each client the texts of one group, in the order of the groups' sorted names.

    Raises:
        DataError: there are not exactly as many groups as clients.
    """
    names, inverse = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    if len(names) != clients:
        raise DataError(
            f"{key} gives one client to each of {len(names)} groups, but clients = {clients}; "
            f"set clients = {len(names)}"
        )
    return [np.flatnonzero(inverse == k) for k in range(clients)]


def by_label(labels: Indices, config: DataConfig, clients: int, seed: int) -> list[Indices]:
    """Skew the classes with flwr-datasets' Dirichlet or pathological partitioner.

    Raises:
        DataError: a client would be left with nothing; says which settings to change.
    """
    held = len(np.unique(labels))
    if config.partition == "pathological" and config.classes_per_client > held:
        raise DataError(
            f"data.classes_per_client = {config.classes_per_client} exceeds the {held} classes of the data"
        )
    require("flwr_datasets", f'data.partition = "{config.partition}"')
    import datasets

    partitioner = _partitioner(config, len(labels), clients, derive(seed, "partition") % 2**32)
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels, "index": np.arange(len(labels))})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = [partitioner.load_partition(client)["index"] for client in range(clients)]
    except ValueError:
        rows = [[]]
    if not all(len(part) for part in rows):
        cures = {
            "dirichlet": f'raise data.alpha = {config.alpha:g}, or take data.partition = "iid"',
            "pathological": f"change data.classes_per_client = {config.classes_per_client}",
        }
        raise DataError(
            f'data.partition = "{config.partition}" leaves a client without enough texts; '
            f"lower clients = {clients}, {cures[config.partition]}"
        )
    parts: list[Indices] = [np.sort(np.asarray(part, dtype=np.int64)) for part in rows]
    if unused := len(labels) - sum(len(part) for part in parts):
        logger.warning("%d texts are of classes that no client holds; they are not trained on", unused)
    return parts


def _partitioner(config: DataConfig, texts: int, clients: int, seed: int) -> Any:
    from flwr_datasets import partitioner

    if config.partition == "pathological":
        return partitioner.PathologicalPartitioner(
            clients, "label", config.classes_per_client, "first-deterministic", seed=seed
        )
    # Below ten texts a client hardly trains; where there is no room for ten, fewer must do.
    least = max(1, min(10, texts // (4 * clients)))
    return partitioner.DirichletPartitioner(
        clients, "label", config.alpha, min_partition_size=least, self_balancing=False, seed=seed
    )


def table(parts: list[Indices], labels: Indices | None, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count texts by client and class: [clients, classes]; one column where there are no labels.

    >>> table([np.array([0, 1]), np.array([2])], np.array([0, 0, 1]), 2).tolist()
    [[2, 0], [0, 1]]
    """
    if labels is None:
        return np.array([[len(part)] for part in parts], dtype=np.int64)
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts]).astype(np.int64)
