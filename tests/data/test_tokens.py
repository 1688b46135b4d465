"""Tokens: padded to the longest of the batch, shared between subsets, equal to plain tokenisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm import tasks
from fedllm.config import DataConfig, RunConfig
from fedllm.data.corpus import Corpus, load
from fedllm.data.tokens import Tokens, encode
from fedllm.errors import DataError
from strategies.session import Session
from tests.parts import task_of


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def texts(tiny_texts: Path) -> Corpus:
    return load(DataConfig(path=str(tiny_texts)), task_of("classification"))


@pytest.fixture(scope="module")
def tokens(texts: Corpus, tokenizer: Any) -> Tokens:
    return task_of("classification").encode(texts, tokenizer, 10)


def test_batches_equal_the_tokenizers_own(tokens: Tokens, texts: Corpus, tokenizer: Any) -> None:
    chosen = [5, 0, 77]
    batch = tokens.batch(chosen)
    expected = tokenizer(
        [texts.texts[i] for i in chosen], truncation=True, max_length=10, padding=True, return_tensors="pt"
    )
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert texts.labels is not None
    assert batch.labels.tolist() == texts.labels[chosen].tolist()
    assert {part.dtype for part in batch[:3]} == {torch.int64}


def test_batch_is_as_wide_as_its_longest_text(tokens: Tokens) -> None:
    short = int(tokens.lengths.argmin())
    assert tokens.lengths[short] < tokens.lengths.max() == 10
    assert tokens.batch([short]).input_ids.shape == (1, tokens.lengths[short])


def test_subset_selects_and_shares(tokens: Tokens) -> None:
    part = tokens.subset(np.array([9, 4, 4]))
    assert len(part) == 3
    assert part.flat is tokens.flat
    for ours, theirs in zip(part.batch([0, 2])[:3], tokens.batch([9, 4])[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert len(tokens.subset([])) == 0


def test_causal_labels_are_the_tokens_with_padding_ignored(texts: Corpus, tokenizer: Any) -> None:
    tokens = task_of("causal").encode(texts, tokenizer, 10)
    batch = tokens.batch([int(tokens.lengths.argmin()), int(tokens.lengths.argmax())])
    real = batch.attention_mask.bool()
    assert not real.all()
    assert torch.equal(batch.labels[real], batch.input_ids[real])
    assert (batch.labels[~real] == -100).all()


def test_long_texts_give_the_tokens_of_the_whole_text(tokenizer: Any) -> None:
    """Only beginnings are looked at; words far longer than usual must not cost a token."""
    long = ["apple " * 400, "x" * 50 + " pear" * 300, ("y" * 60 + " ") * 40, "plum\n" * 200, "\u6885" * 500]
    corpus = Corpus(long, np.zeros(5, dtype=np.int64), ("a", "b"), None)
    tokens = task_of("classification").encode(corpus, tokenizer, 12)
    expected = tokenizer(long, truncation=True, max_length=12)["input_ids"]
    for index, ids in enumerate(expected):
        assert tokens.batch([index]).input_ids[0].tolist() == ids


def byte_level(merges: list[tuple[str, str]]) -> Any:
    """A byte-level BPE that splits nothing before it merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!")


def test_tokens_that_reach_across_a_space_are_those_of_the_whole_text() -> None:
    """Ten tokens of eight letters, one of twelve, then one that spans the place where 96 letters end."""
    merges = [(letter * n, letter * n) for letter in "st" for n in (1, 2, 4)] + [("t" * 8, "t" * 4)]
    merges += [("abcd efg".replace(" ", "\u0120")[:n], "abcd\u0120efg"[n]) for n in range(1, 8)]
    tokenizer = byte_level(merges)
    text = "s" * 80 + "t" * 12 + "abcd efg and more"
    expected = tokenizer(text, truncation=True, max_length=12)["input_ids"]
    assert tokenizer.decode(expected[-1:]) == "abcd efg"
    tokens = task_of("causal").encode(Corpus([text], None, (), None), tokenizer, 12)
    assert tokens.batch([0]).input_ids[0].tolist() == expected


def test_a_text_is_cut_after_a_word_and_not_between_blanks() -> None:
    """Ten tokens of eight letters, one of sixteen, then a line end and a blank that are one token."""
    merges = [(letter * n, letter * n) for letter in "st" for n in (1, 2, 4)] + [("t" * 8, "t" * 8)]
    tokenizer = byte_level([*merges, ("\u010a", "\u0120")])
    text = "s" * 80 + "t" * 16 + "\n and more"
    expected = tokenizer(text, truncation=True, max_length=12)["input_ids"]
    assert tokenizer.decode(expected[-1:]) == "\n "
    tokens = task_of("causal").encode(Corpus([text], None, (), None), tokenizer, 12)
    assert tokens.batch([0]).input_ids[0].tolist() == expected


@pytest.mark.parametrize(("length", "task"), [(1, "causal"), (2, "classification")])
def test_a_length_that_holds_only_special_tokens_is_refused(
    length: int, task: str, texts: Corpus, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=rf"max_length = {length} leaves no room .* set it to 3 at least"):
        task_of(task).encode(texts, tokenizer, length)
    assert task_of(task).encode(texts, tokenizer, 3).lengths.max() == 3


def test_texts_of_one_token_alone_predict_nothing() -> None:
    task = task_of("causal")
    tokens = task.encode(Corpus(["a", "bc"], None, (), None), byte_level([]), 8)
    assert task.teaching(tokens).tolist() == [False, True]


def test_a_client_trains_on_texts_that_predict_something(tiny_causal: Path, tiny_texts: Path) -> None:
    config = RunConfig.model_validate(
        {
            "clients": 2,
            "model": {"name": str(tiny_causal), "task": "causal"},
            "data": {"path": str(tiny_texts), "client_test_fraction": 0.5},
        }
    )
    session = Session(config)
    lengths = np.array([3, 1, 2, 1, 4, 1])
    starts = np.cumsum(lengths) - lengths
    session.__dict__["train_tokens"] = Tokens(np.arange(12, dtype=np.int32), starts, lengths, None, 0)
    session.__dict__["partition"] = [np.array([0, 1, 2, 3, 4]), np.array([1, 3, 5])]
    train, test = session.client_tokens(0)
    assert sorted([*train.lengths, *test.lengths]) == [2, 3, 4]
    with pytest.raises(
        DataError, match=r"no text of client 1 has a second token to predict; raise data\.max"
    ):
        session.client_tokens(1)


def test_texts_to_classify_need_classes(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data\.label"):
        task_of("classification").encode(Corpus(["apple"], None, (), None), tokenizer, 8)


def test_a_text_without_tokens_is_refused(tokenizer: Any) -> None:
    class Nothing:
        truncation_side = "right"
        pad_token_id = 0

        def num_special_tokens_to_add(self) -> int:
            return 0

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] for _ in texts]}

    with pytest.raises(DataError, match="has no token"):
        task_of("causal").encode(Corpus(["\u200b"], None, (), None), Nothing(), 8)


def long_texts(*counts: int) -> Corpus:
    """Texts of so many words, ``apple`` and ``iron`` in turn, with a class each."""
    texts = [" ".join(["apple", "iron"][i % 2] for i in range(count)) for count in counts]
    return Corpus(texts, np.arange(len(counts)), tuple(map(str, range(len(counts)))), None)


def test_overlong_texts_are_cut_split_or_left_out(tokenizer: Any) -> None:
    corpus = long_texts(3, 20, 8, 9)  # with two special tokens: 8 words are just not too long for 10
    whole = tokenizer(corpus.texts, add_special_tokens=False)["input_ids"]
    first, last = tokenizer("", add_special_tokens=True)["input_ids"]

    cut = encode(corpus, tokenizer, 10)
    assert cut.cut is not None
    assert cut.cut.tolist() == [False, True, False, True]
    assert cut.owners is None

    split = encode(corpus, tokenizer, 10, "split")
    assert split.owners is not None
    assert split.owners.tolist() == [0, 1, 1, 1, 2, 3, 3]
    assert split.labels is not None
    assert split.labels.tolist() == [0, 1, 1, 1, 2, 3, 3]
    rows = [split.batch([row]).input_ids[0].tolist() for row in range(len(split))]
    assert all(row[0] == first and row[-1] == last and len(row) <= 10 for row in rows)
    for text in range(4):
        joined = [token for row in split.rows_of(text) for token in rows[row][1:-1]]
        assert joined == whole[text]

    dropped = encode(corpus, tokenizer, 10, "drop")
    assert dropped.texts().tolist() == [0, 2]
    assert [dropped.batch([row]).input_ids[0].tolist()[1:-1] for row in (0, 1)] == [whole[0], whole[2]]


@pytest.mark.parametrize(
    ("overlong", "said"),
    [
        ("truncate", "2 of 4 texts were longer than data.max_length = 10 tokens and were cut"),
        ("split", "2 of 4 texts were longer than data.max_length = 10 tokens and make 5 rows"),
        ("drop", "2 of 4 texts were longer than data.max_length = 10 tokens and were left out"),
    ],
)
def test_what_is_lost_of_long_texts_is_counted(tokenizer: Any, overlong: str, said: str) -> None:
    config = RunConfig.model_validate({"data": {"max_length": 10, "overlong": overlong}})
    task = tasks.of(config)
    corpus = long_texts(3, 20, 8, 9)
    assert task.notes(corpus, task.encode(corpus, tokenizer, 10)) == [said]
    few = corpus.subset([0, 2])
    assert task.notes(few, task.encode(few, tokenizer, 10)) == []


def test_beginnings_of_long_texts_count_as_the_whole_ones(tokenizer: Any) -> None:
    corpus = long_texts(400, 8, 9)
    corpus = replace(corpus, texts=[*corpus.texts[:2], corpus.texts[2] + " " * 500])
    found = encode(corpus, tokenizer, 10)
    assert found.cut is not None
    assert found.cut.tolist() == [True, False, True]


def test_a_long_text_is_of_the_class_that_the_mean_of_its_rows_says(tokenizer: Any) -> None:
    config = RunConfig.model_validate({"data": {"max_length": 10, "overlong": "split"}})
    task = tasks.of(config)
    corpus = replace(long_texts(20, 3), label_names=("0", "1"))
    tokens = task.encode(corpus, tokenizer, 10)
    # Two rows of the first text are for class 1, the third is so sure of class 0 that it outweighs them.
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [9.0, 0.0], [2.0, 0.0]])
    scorer = task.scorer(tokens, ("0", "1"))
    for rows in ([3, 1], [0, 2]):
        scorer.add(np.array(rows), logits[rows], torch.zeros(2))
    assert scorer.scores(1.0)["accuracy"] == 0.5
    answers = task.answers(corpus, tokens, list(logits), ("0", "1"))
    assert [index for index, _ in answers] == [0, 1]
    assert answers[0][1]["label"] == "0"
    assert answers[0][1]["probabilities"]["0"] == pytest.approx(1 / (1 + np.exp(2 / 3 - 9 / 3)))


def test_a_client_whose_texts_are_all_left_out_ends_it_in_a_sentence(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    config = RunConfig.model_validate(
        {
            "clients": 4,
            "model": {"name": str(tiny_encoder)},
            "tuning": {"targets": ["query"]},
            "data": {"path": str(tiny_texts), "max_length": 4, "overlong": "drop"},
        }
    )
    with pytest.raises(DataError, match=r"no text of the test set is at most data.max_length = 4 tokens"):
        Session(config).prepare()
