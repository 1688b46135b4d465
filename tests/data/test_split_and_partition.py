"""Splits and partitions: nothing lost, nothing twice, the same for the same seed, no client empty."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedllm import tasks
from fedllm.config import DataConfig, RunConfig
from fedllm.data.corpus import Corpus, hold_out, load, partition, partition_table, split
from fedllm.errors import DataError
from strategies.session import Session
from tests.parts import task_of


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


@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=12),
    fraction=st.floats(0.1, 0.8),
    seed=st.integers(0, 9),
)
def test_split_keeps_every_group_whatever_the_seed(sizes: list[int], fraction: float, seed: int) -> None:
    owners = [f"user {k}" for k, size in enumerate(sizes) for _ in range(size)]
    whole = Corpus([f"text {i}" for i in range(len(owners))], None, (), owners)
    if max(sizes) == 1:
        with pytest.raises(DataError, match="leaves none to test on"):
            split(whole, fraction, seed)
        return
    train, test = split(whole, fraction, seed)
    assert sorted(train.texts + test.texts) == sorted(whole.texts)
    assert train.groups is not None
    assert test.groups is not None
    assert set(train.groups) == set(owners)
    for k, size in enumerate(sizes):
        assert test.groups.count(f"user {k}") <= min(np.ceil(size * fraction), size - 1)


def test_split_of_groups_still_holds_out_of_every_class() -> None:
    whole = corpus([40, 20], [f"user {i % 6}" for i in range(60)])
    test = split(whole, 0.25, 1)[1]
    assert np.bincount(test.labels).tolist() == [10, 5]


def test_another_share_than_was_asked_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(split(corpus([2] * 20), 0.2, 0)[1]) == 20
    assert "0.2 of 40 texts would hold out 8, but small classes, groups or copies make it 20" in caplog.text


def test_copies_that_leave_nothing_to_test_are_named() -> None:
    same = Corpus(["one text"] * 20, np.zeros(20, dtype=np.int64), ("a",), None)
    with pytest.raises(DataError, match=r"0\.2 of 20 texts \(1 of them differ\) leaves none"):
        split(same, 0.2, 0)


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def test_a_test_set_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is scored by the training texts' classes, whichever it holds, and nothing else is held out."""
    rows = [(f"text {i}", "abc"[i % 3]) for i in range(30)]
    settings = {
        "path": write(tmp_path / "train.jsonl", rows),
        "test_path": write(tmp_path / "test.jsonl", [("new", "c"), ("text 4", "b")]),
    }
    session = Session(RunConfig.model_validate({"clients": 2, "data": settings}))
    with caplog.at_level(logging.WARNING):
        train, test = session.split
    assert train.texts == [text for text, _ in rows]
    assert test.labels is not None
    assert (test.texts, test.labels.tolist(), test.label_names) == (
        ["new", "text 4"],
        [2, 1],
        ("a", "b", "c"),
    )
    assert sorted(np.concatenate(session.partition).tolist()) == list(range(30))
    assert "1 texts of data.test_path are among the training texts too" in caplog.text


@pytest.mark.parametrize(
    ("rows", "words"),
    [([("t", "z")], "label 'z' is none of the federation's classes: a, b"), (None, "does not exist")],
)
def test_a_test_set_that_does_not_fit_says_that_it_is_the_test_set(
    rows: list[tuple[str, str]] | None, words: str, tmp_path: Path
) -> None:
    settings = {"path": write(tmp_path / "train.jsonl", [("t", "a"), ("u", "b")])}
    settings["test_path"] = write(tmp_path / "test.jsonl", rows) if rows else str(tmp_path / "none.jsonl")
    session = Session(RunConfig.model_validate({"clients": 1, "data": settings}))
    with pytest.raises(DataError, match=f"data.test_path: .*{words}"):
        session.prepare()


def test_hold_out_is_disjoint_and_leaves_something_to_train() -> None:
    part = np.arange(20, 30)
    train, test = hold_out(part, 0.3, 0, 1)
    assert sorted([*train, *test]) == part.tolist()
    assert len(test) == 3
    assert len(hold_out(np.array([4]), 0.9, 0, 1)[0]) == 1


@given(st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=40), st.integers(0, 3))
def test_what_belongs_together_is_held_out_together(owners: list[str], seed: int) -> None:
    assume(len(set(owners)) > 1)
    part = np.arange(100, 100 + len(owners))
    largest = max(owners.count(owner) for owner in owners) / len(owners)
    train, test = hold_out(part, largest, seed, 1, owners)
    assert sorted([*train, *test]) == part.tolist()
    assert 0 < len(test) <= round(largest * len(owners))
    assert not {owners[k - 100] for k in train} & {owners[k - 100] for k in test}


def test_what_belongs_together_may_be_too_much_to_hold_out() -> None:
    with pytest.raises(DataError, match=r"client 7 has 4 texts and none .*\(data\.group\).* = 0\.5 of them"):
        hold_out(np.arange(4), 0.5, 0, 7, ["a", "a", "a", "a"])
    assert hold_out(np.arange(4), 0.0, 0, 7, ["a", "a", "a", "a"])[1].tolist() == []


def test_both_splits_keep_what_belongs_together(tmp_path: Path, tiny_encoder: Path) -> None:
    """The texts of a story have as many words as its number says, by which their tokens are known."""
    fruit = ["pear", "plum", "melon", "grape"]
    rows = [
        {"text": "apple " * (k // 4) + fruit[k % 4], "label": "xy"[k % 2], "story": k // 4} for k in range(80)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"path": str(file), "group": "story", "client_test_fraction": 0.4}
    run = {"clients": 2, "data": where, "model": {"name": str(tiny_encoder)}}
    session = Session(RunConfig.model_validate(run))
    train, test = ({len(text.split()) for text in side.texts} for side in session.split)
    assert len(test) == 4
    assert not train & test
    kept, held = ({int(length) - 2 for length in tokens.lengths} for tokens in session.client_tokens(1))
    assert held
    assert not kept & held
    assert kept | held <= train


def test_a_row_that_belongs_to_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "t", "label": "x", "story": null}\n')
    with pytest.raises(
        DataError, match=r"line 1: column 'story' \(data.group\) must say what the row belongs"
    ):
        load(DataConfig(path=str(file), group="story"), task_of("classification"))


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
    train, test = split(load(DataConfig(), task_of("classification")), 0.2, 0)
    assert (len(train), len(test)) == (1780, 445)
    assert not set(train.texts) & set(test.texts)


@pytest.mark.slow
def test_iid_on_bundled_text_imports_no_slow_library() -> None:
    program = (
        "import sys; from fedllm import tasks; from fedllm.config import DataConfig, RunConfig;"
        "from fedllm.data.corpus import load, partition, split;"
        "train, _ = split(load(DataConfig(), tasks.of(RunConfig())), 0.2, 0);"
        "partition(train, DataConfig(), 10, 0);"
        "slow = {'torch', 'datasets', 'pandas', 'pyarrow', 'flwr_datasets', 'transformers'};"
        "print(sorted(slow & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("task", "row", "why"),
    [
        (
            "span",
            {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}},
            "there is no column 'label' (data.label); ",
        ),
        (
            "classification",
            {"text": "t", "label": ["a", "b"]},
            "column 'label' (data.label) must hold a class, ",
        ),
    ],
)
def test_who_shares_out_by_class_is_told_what_needs_none(
    tmp_path: Path, task: str, row: dict[str, Any], why: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    config = RunConfig.model_validate(
        {"model": {"task": task}, "data": {"path": str(path), "label": "label", "partition": "dirichlet"}}
    )
    with pytest.raises(DataError) as told:
        load(config.data, tasks.of(config))
    assert f"rows.jsonl, line 1: {why}" in str(told.value)
    assert str(told.value).endswith(
        '; data.partition = "dirichlet" shares texts out by class, "iid" needs none'
    )
