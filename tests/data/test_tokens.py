"""Tokens: padded to the longest of the batch, shared between subsets, equal to plain tokenisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.config import DataConfig
from fedllm.data import Corpus, Tokens, load, tokenise
from fedllm.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture(scope="module")
def texts(tiny_texts: Path) -> Corpus:
    return load(DataConfig(path=str(tiny_texts)), "classification")


@pytest.fixture(scope="module")
def tokens(texts: Corpus, tokenizer: Any) -> Tokens:
    return tokenise(texts, tokenizer, 10, "classification")


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
    assert {part.dtype for part in batch} == {torch.int64}


def test_batch_is_as_wide_as_its_longest_text(tokens: Tokens) -> None:
    short = int(tokens.lengths.argmin())
    assert tokens.lengths[short] < tokens.lengths.max() == 10
    assert tokens.batch([short]).input_ids.shape == (1, tokens.lengths[short])


def test_subset_selects_and_shares(tokens: Tokens) -> None:
    part = tokens.subset(np.array([9, 4, 4]))
    assert len(part) == 3
    assert part.flat is tokens.flat
    for ours, theirs in zip(part.batch([0, 2]), tokens.batch([9, 4]), strict=True):
        assert torch.equal(ours, theirs)
    assert len(tokens.subset([])) == 0


def test_causal_labels_are_the_tokens_with_padding_ignored(texts: Corpus, tokenizer: Any) -> None:
    tokens = tokenise(texts, tokenizer, 10, "causal")
    batch = tokens.batch([int(tokens.lengths.argmin()), int(tokens.lengths.argmax())])
    real = batch.attention_mask.bool()
    assert not real.all()
    assert torch.equal(batch.labels[real], batch.input_ids[real])
    assert (batch.labels[~real] == -100).all()


def test_long_texts_give_the_tokens_of_the_whole_text(tokenizer: Any) -> None:
    """Only beginnings are looked at; words far longer than usual must not cost a token."""
    long = ["apple " * 400, "x" * 50 + " pear" * 300, ("y" * 60 + " ") * 40, "plum\n" * 200, "\u6885" * 500]
    corpus = Corpus(long, np.zeros(5, dtype=np.int64), ("a", "b"), None)
    tokens = tokenise(corpus, tokenizer, 12, "classification")
    expected = tokenizer(long, truncation=True, max_length=12)["input_ids"]
    for index, ids in enumerate(expected):
        assert tokens.batch([index]).input_ids[0].tolist() == ids


def test_texts_to_classify_need_classes(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data\.label"):
        tokenise(Corpus(["apple"], None, (), None), tokenizer, 8, "classification")


def test_a_text_without_tokens_is_refused(tokenizer: Any) -> None:
    class Nothing:
        truncation_side = "right"
        pad_token_id = 0

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[] for _ in texts]}

    with pytest.raises(DataError, match="has no token"):
        tokenise(Corpus(["\u200b"], None, (), None), Nothing(), 8, "causal")
