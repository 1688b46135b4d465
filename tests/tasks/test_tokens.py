"""Tagging words: which token carries which tag, what is counted, what is shown."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import pytest
import torch

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.data.corpus import Corpus, load
from fedllm.data.reading import Row
from fedllm.data.tokens import Tokens
from fedllm.errors import ConfigError, DataError
from fedllm.tasks.base import IGNORED, Task
from fedllm.tasks.tokens import EntityScores, _first_tokens
from tests.tasks.pieces import by_letters


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return by_letters()


def tagging(**data: Any) -> Task:
    return tasks.of(RunConfig.model_validate({"model": {"task": "tokens"}, "data": data}))


def corpus_of(task: Task, *rows: dict[str, Any], classes: tuple[str, ...] | None = None) -> Corpus:
    found = (Row(row, "a.jsonl", f"a.jsonl, line {line}") for line, row in enumerate(rows, start=1))
    return load(task.config.data, task, classes, found)


def carried(tokens: Tokens, names: tuple[str, ...], tokenizer: Any, row: int = 0) -> list[tuple[str, str]]:
    """The tokens of a row that carry a tag, and which."""
    batch = tokens.batch([row])
    pieces = tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    tags = batch.labels[0].tolist()
    return [(piece, names[tag]) for piece, tag in zip(pieces, tags, strict=True) if tag != IGNORED]


RIO = {"tokens": ["From", "Rio", "de", "Ana"], "tags": ["O", "B-city", "I-city", "B-name"]}


def test_the_first_piece_of_a_word_carries_its_tag(tokenizer: Any) -> None:
    task = tagging()
    corpus = corpus_of(task, RIO)
    assert corpus.label_names == ("O", "B-city", "I-city", "B-name", "I-name")
    tokens = task.encode(corpus, tokenizer, 32)
    assert carried(tokens, corpus.label_names, tokenizer) == [
        ("F", "O"), ("R", "B-city"), ("d", "I-city"), ("A", "B-name"),
    ]  # fmt: skip
    assert tokens.lengths[0] == 2 + len("FromRiodeAna")


def test_spans_of_a_text_are_tags_of_its_words(tokenizer: Any) -> None:
    task = tagging(text="body", columns={"entities": "marks"})
    spans = [{"start": 5, "end": 11, "label": "city"}]
    corpus = corpus_of(task, {"body": "From Rio de, ok", "marks": spans})
    tokens = task.encode(corpus, tokenizer, 32)
    assert carried(tokens, corpus.label_names, tokenizer) == [
        ("F", "O"), ("R", "B-city"), ("d", "I-city"), (",", "O"), ("o", "O"),
    ]  # fmt: skip
    assert tokens.places is not None
    assert tokens.places[tokens.places[:, 1] > 0].tolist() == [[0, 4], [5, 8], [9, 11], [11, 12], [13, 15]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_split_texts_have_every_word_once_and_in_order(tokenizer: Any, side: str) -> None:
    task = tagging(overlong="split")
    corpus = corpus_of(task, RIO, {"tokens": ["a", "b"], "tags": ["O", "O"]})
    tokenizer.truncation_side = side
    try:
        tokens = task.encode(corpus, tokenizer, 5)  # three letters a row
    finally:
        tokenizer.truncation_side = "right"
    assert tokens.owners is not None
    assert tokens.owners.tolist() == [0, 0, 0, 0, 1]
    found = [carried(tokens, corpus.label_names, tokenizer, row) for row in range(5)]
    assert [tag for row in found[:4] for _, tag in row] == RIO["tags"]
    assert task.teaching(tokens).tolist() == [bool(row) for row in found]


def test_words_that_are_cut_off_are_counted(tokenizer: Any) -> None:
    task = tagging(max_length=9)
    corpus = corpus_of(task, RIO, {"tokens": ["a", "b"], "tags": ["O", "O"]})
    assert task.notes(corpus, task.encode(corpus, tokenizer, 9)) == [
        "1 of 2 texts were longer than data.max_length = 9 tokens and were cut",
        "2 of 6 words have no token of their own in what is read: they are left out",
    ]


def test_tags_that_are_no_iob2_are_counted_and_mended(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        corpus = corpus_of(tagging(), {"tokens": ["a", "b"], "tags": ["I-x", "E-x"]}, RIO)
    assert "2 of 6 tags are not written as IOB2 has them" in caplog.text
    assert corpus.parts is not None
    assert corpus.parts[0]["tags"] == ["B-x", "I-x"]


def test_the_federation_settles_the_tags() -> None:
    task = tagging()
    names = ("O", "B-city", "I-city")
    assert corpus_of(task, {"tokens": ["a"], "tags": ["O"]}, classes=names).label_names == names
    with pytest.raises(DataError, match="tag 'B-name' is none of the federation's: O, B-city, I-city"):
        corpus_of(task, RIO, classes=names)


@pytest.mark.parametrize("classes", [["city"], ["B-city", "I-city"], ["O", "I-city"]])
def test_classes_that_are_no_tags_are_refused(classes: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.classes must name all tags"):
        tagging(classes=classes)


def test_an_unknown_role_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\.tag is no column .*tags"):
        tagging(columns={"tag": "ner"})


def naive(tags: list[str]) -> set[tuple[int, int, str]]:
    """Entities by walking through the tags."""
    found, start = set(), None
    for place, tag in enumerate([*tags, "O"]):
        if start is not None and tag != f"I-{tags[start][2:]}":
            found.add((start, place, tags[start][2:]))
            start = None
        if tag != "O" and start is None:
            start = place
    return found


def test_texts_without_an_entity_give_no_f1() -> None:
    scorer = EntityScores(
        Tokens(np.zeros(2, dtype=np.int32), np.array([0]), np.array([2]), None, 0), ("O", "B-a")
    )
    scorer.add(np.arange(1), torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long))
    assert not {"f1", "precision", "recall"} & scorer.scores(1.0).keys()


def test_a_client_tells_its_own_f1_if_its_texts_hold_an_entity() -> None:
    whole = {"f1": 0.5, "precision": 0.6, "recall": 0.4}
    assert tagging().told({"loss": 1.0, **whole, "texts/a": 2.0, "f1/a": 0.5}) == {"loss": 1.0, **whole}
    assert tagging().told({"loss": 1.0, **whole, "texts/a": 0.0, "f1/a": 0.0}) == {"loss": 1.0}
    assert tagging().averaged({"loss": 1.0, **whole}) == {"loss": 1.0}


def test_scores_are_those_of_whole_entities() -> None:
    names = ("O", "B-a", "I-a", "B-b", "I-b")
    pick = random.Random(0)
    lengths = [pick.randrange(1, 12) for _ in range(40)]
    targets = [[pick.randrange(5) for _ in range(length)] for length in lengths]
    guesses = [[t if pick.random() < 0.7 else pick.randrange(5) for t in row] for row in targets]
    flat = np.zeros(sum(lengths), dtype=np.int32)
    starts = np.cumsum([0, *lengths[:-1]])
    # Rows 2k and 2k + 1 are two halves of one text.
    owners = np.arange(40) // 2
    tokens = Tokens(flat, starts, np.array(lengths), None, 0, owners=owners)
    scorer = EntityScores(tokens, names)
    for rows in (np.arange(39, 19, -1), np.arange(20)):
        width = max(lengths[row] for row in rows)
        labels = torch.full((len(rows), width), IGNORED)
        logits = torch.zeros(len(rows), width, 5)
        for place, row in enumerate(rows.tolist()):
            labels[place, : lengths[row]] = torch.tensor(targets[row])
            logits[place, torch.arange(lengths[row]), torch.tensor(guesses[row])] = 1.0
        scorer.add(rows, logits, labels)
    found = scorer.scores(1.0)
    whole = [
        [[names[tag] for row in (2 * k, 2 * k + 1) for tag in tags[row]] for k in range(20)]
        for tags in (targets, guesses)
    ]
    actual, predicted = ({(k, *e) for k, tags in enumerate(side) for e in naive(tags)} for side in whole)
    for kind, suffix in (("", ""), ("a", "/a"), ("b", "/b")):
        ours, theirs = ({e for e in side if kind in ("", e[3])} for side in (actual, predicted))
        hits = len(ours & theirs)
        assert found[f"precision{suffix}"] == pytest.approx(hits / len(theirs))
        assert found[f"recall{suffix}"] == pytest.approx(hits / len(ours))
        assert found[f"f1{suffix}"] == pytest.approx(2 * hits / (len(ours) + len(theirs)))
        assert not suffix or found[f"texts{suffix}"] == len(ours)


@pytest.mark.parametrize(
    "row", [{"text": "From Rio de, ok"}, {"tokens": ["From", "Rio", "de", ",", "ok"], "tags": ["odd"] * 5}]
)
def test_entities_are_shown_in_the_text(tokenizer: Any, row: dict[str, Any]) -> None:
    task = tagging(overlong="split")
    names = ("O", "B-city", "I-city")
    corpus = task.ask([Row(row, "given", "text 1")], names)
    tokens = task.encode(corpus, tokenizer, 6)
    logits = []
    for one in range(len(tokens)):
        batch = tokens.batch([one])
        pieces = tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
        likeliest = [{"R": 1, "d": 2}.get(piece, 0) for piece in pieces]
        logits.append(torch.eye(3)[likeliest])
    ((index, answer),) = task.answers(corpus, tokens, logits, names)
    assert index == 0
    text = corpus.texts[0]
    start = text.index("Rio")
    assert answer["entities"] == [{"label": "city", "start": start, "end": start + 6, "text": "Rio de"}]
    assert task.shown({"text": text, **answer}) == text.replace("Rio de", "[Rio de: city]")


def test_a_token_that_begins_two_words_is_the_first_ones() -> None:
    tokens = np.array([[0, 0], [0, 5], [5, 7], [7, 8], [0, 0]])
    words = np.array([[0, 2], [3, 5], [5, 8], [9, 10]])  # the last one was cut off
    chosen, spots = _first_tokens(tokens, words)
    assert (chosen.tolist(), spots.tolist()) == ([0, 2], [1, 2])
