"""Splits and partitions: nothing lost, nothing twice, the same for the same seed, no client empty."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config import DataConfig
from fedllm.data import Corpus, hold_out, load, partition, partition_table, split
from fedllm.errors import DataError


def corpus(counts: list[int], groups: list[str] | None = None) -> Corpus:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"class {k}" for k in range(len(counts)))
    return Corpus([f"text {i}" for i in range(len(labels))], labels, names, groups)


@given(
    counts=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_split_is_stratified_and_complete(counts: list[int], fraction: float, seed: int) -> None:
    whole = corpus(counts)
    train, test = split(whole, fraction, seed)
    assert sorted(train.texts + test.texts) == sorted(whole.texts)
    held = np.bincount(test.labels, minlength=len(counts))
    for count, share in zip(counts, held, strict=True):
        assert 1 <= share <= count - 1
        assert abs(share - fraction * count) <= 1
    assert test.label_names == train.label_names == whole.label_names
    again = split(whole, fraction, seed)
    assert again[1].texts == test.texts


def test_split_depends_on_the_seed() -> None:
    whole = corpus([50, 50])
    assert split(whole, 0.2, 0)[1].texts != split(whole, 0.2, 1)[1].texts


def test_split_total_is_the_fraction_of_the_whole() -> None:
    """Largest remainder: 510, 386, 417, 511, 401 rounded one by one would give 444."""
    assert len(split(corpus([510, 386, 417, 511, 401]), 0.2, 0)[1]) == 445


def test_split_keeps_copies_on_one_side() -> None:
    whole = corpus([60, 60])
    whole = Corpus([whole.texts[i // 2] for i in range(120)], whole.labels, whole.label_names, None)
    train, test = split(whole, 0.3, 0)
    assert len(test) == 36
    assert not set(train.texts) & set(test.texts)


def test_split_refuses_a_class_seen_once() -> None:
    with pytest.raises(DataError, match="class 'class 1' has a single text"):
        split(corpus([5, 1]), 0.2, 0)


def test_hold_out_is_disjoint_and_leaves_something_to_train() -> None:
    part = np.arange(20, 30)
    train, test = hold_out(part, 0.3, 0, 1)
    assert sorted([*train, *test]) == part.tolist()
    assert len(test) == 3
    assert len(hold_out(np.array([4]), 0.9, 0, 1)[0]) == 1


def config(**settings: Any) -> DataConfig:
    return DataConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"partition": "iid"},
        {"partition": "dirichlet", "alpha": 0.5},
        {"partition": "pathological", "classes_per_client": 2},
        {"partition": "natural", "by": "who"},
        {"partition": "file", "path": "folder"},
    ],
    ids=lambda settings: settings["partition"],
)
def test_partition_deals_every_text_out_once(settings: dict[str, Any]) -> None:
    train = corpus([80, 70, 90], [f"group {i % 6}" for i in range(240)])
    parts = partition(train, config(**settings), 6, seed=3)
    assert len(parts) == 6
    assert sorted(np.concatenate(parts).tolist()) == list(range(240))
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)
    again = partition(train, config(**settings), 6, seed=3)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("settings", [{"partition": "iid"}, {"partition": "dirichlet"}])
def test_partition_depends_on_the_seed(settings: dict[str, Any]) -> None:
    train = corpus([80, 70, 90])
    first, second = (partition(train, config(**settings), 4, seed) for seed in (0, 1))
    assert [part.tolist() for part in first] != [part.tolist() for part in second]


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(part) for part in partition(corpus([50, 53]), config(), 7, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_more_clients_than_texts_draw_with_replacement_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parts = partition(corpus([10, 10]), config(), 50, 0)
    assert "50 clients share 20 texts" in caplog.text
    assert all(len(set(part.tolist())) == len(part) == 8 for part in parts)
    assert len({tuple(part) for part in parts}) > 40


def test_pathological_gives_each_client_its_number_of_classes() -> None:
    train = corpus([40, 40, 40, 40])
    parts = partition(train, config(partition="pathological", classes_per_client=2), 8, 0)
    counts = partition_table(train, parts)
    assert ((counts > 0).sum(axis=1) == 2).all()


def test_classes_that_no_client_holds_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    settings = config(partition="pathological", classes_per_client=1)
    with caplog.at_level(logging.WARNING):
        parts = partition(corpus([10, 10, 10, 7]), settings, 3, 0)
    assert sum(len(part) for part in parts) == 30
    assert "7 texts are of classes that no client holds" in caplog.text


def test_dirichlet_gets_more_even_as_alpha_grows() -> None:
    train = corpus([400, 400, 400])
    skew = []
    for alpha in (0.1, 1.0, 1000.0):
        counts = partition_table(train, partition(train, config(partition="dirichlet", alpha=alpha), 5, 0))
        skew.append((counts / counts.sum(axis=1, keepdims=True)).std(axis=0).mean())
    assert skew[0] > skew[1] > skew[2]
    assert skew[2] < 0.05


def test_natural_agrees_with_flwr_datasets() -> None:
    import datasets
    from flwr_datasets.partitioner import NaturalIdPartitioner

    groups = [f"author {i % 5}" for i in range(60)]
    ours = partition(corpus([30, 30], groups), config(partition="natural", by="who"), 5, 0)
    theirs = NaturalIdPartitioner("who")
    theirs.dataset = datasets.Dataset.from_dict({"who": groups, "index": list(range(60))})
    expected = {tuple(theirs.load_partition(k)["index"]) for k in range(5)}
    assert {tuple(part.tolist()) for part in ours} == expected


@pytest.mark.parametrize(
    ("settings", "clients", "words"),
    [
        ({"partition": "dirichlet", "alpha": 0.01}, 20, ["data.alpha = 0.01", "clients = 20", "iid"]),
        ({"partition": "pathological", "classes_per_client": 9}, 3, ["classes_per_client = 9", "2 classes"]),
        (
            {"partition": "natural", "by": "who"},
            3,
            ["data.by = 'who'", "each of 4 groups", "set clients = 4"],
        ),
    ],
)
def test_impossible_partitions_say_what_to_change(
    settings: dict[str, Any], clients: int, words: list[str]
) -> None:
    train = corpus([20, 20], [f"author {i % 4}" for i in range(40)])
    with pytest.raises(DataError) as caught:
        partition(train, config(**settings), clients, 0)
    for word in words:
        assert word in str(caught.value)


def test_table_counts_by_client_and_class() -> None:
    train = corpus([3, 2])
    parts = [np.array([0, 3]), np.array([1, 2, 4])]
    assert partition_table(train, parts).tolist() == [[1, 1], [2, 1]]
    unlabelled = Corpus(train.texts, None, (), None)
    assert partition_table(unlabelled, parts).tolist() == [[2], [3]]


def test_bbc_split_holds_out_445_articles_and_no_copy() -> None:
    train, test = split(load(DataConfig(), "classification"), 0.2, 0)
    assert (len(train), len(test)) == (1780, 445)
    assert not set(train.texts) & set(test.texts)


def test_iid_on_bundled_text_imports_no_slow_library() -> None:
    program = (
        "import sys; from fedllm.config import DataConfig; from fedllm.data import load, partition, split;"
        "train, _ = split(load(DataConfig(), 'classification'), 0.2, 0);"
        "partition(train, DataConfig(), 10, 0);"
        "slow = {'datasets', 'pandas', 'pyarrow', 'flwr_datasets', 'transformers'};"
        "print(sorted(slow & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
