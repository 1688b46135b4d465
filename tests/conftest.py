"""Tiny models and texts, built in code, that load through the same doors as real ones."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sqlite3
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fedllm.models.model import Model
    from tests.architectures import Architecture

# This file is read by every process of a test run: what needs torch is imported where it is used.
# Both are read when torch and transformers are first imported: one thread, and nothing from a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# pytest-xdist tells its workers the width of a terminal that they do not write to.
os.environ.pop("COLUMNS", None)

CLASSES = {
    "fruit": ["apple", "pear", "plum", "melon", "cherry", "grape"],
    "metal": ["iron", "copper", "zinc", "silver", "nickel", "lead"],
    "animal": ["horse", "otter", "heron", "lynx", "badger", "trout"],
}
"""Each class has words of its own, so that a few steps of training tell them apart."""

COMMON = ["the", "a", "we", "saw", "one", "old", "new", "today", "and", "again", "near", "here"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while the libraries are imported, nor ever again among what they made.

    They make a million objects that stay. To go through them takes most of a second each time, a quarter
    of what collecting the tests takes.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        _let_torch_log()


def _let_torch_log() -> None:
    """Let the loggers of torch tell the root's handlers, as others do.

    There are a hundred that would not, and pytest gives each of them handlers of its own six times a test:
    a twentieth of what the quick part takes.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "torch":
            logger.propagate = True


class _Hasty(sqlite3.Connection):
    """Leaves it to the system when what was committed reaches the disk."""

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if sql.startswith(("BEGIN", "PRAGMA journal_mode")):
            super().execute("PRAGMA synchronous = OFF")
        return super().execute(sql, *parameters)


@pytest.fixture(autouse=True)
def _disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk, but in ``tests/store``: only a loss of power would tell the difference."""
    monkeypatch.setattr(os, "fsync", os.fstat)
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=_Hasty))


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """240 short texts of three equally frequent, learnable classes, with an author each."""
    pick = random.Random(0)
    made = []
    for index in range(240):
        label = list(CLASSES)[index % 3]
        words = pick.choices(CLASSES[label], k=3) + pick.choices(COMMON, k=pick.randrange(3, 9))
        pick.shuffle(words)
        made.append({"text": " ".join(words), "label": label, "author": f"author {index % 4}"})
    return made


@pytest.fixture(scope="session")
def tiny_texts(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as a jsonl file: ``data.path``."""
    file = tmp_path_factory.mktemp("texts") / "tiny.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers x 32 with a word tokenizer: ``model.name``."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = save_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertModel(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                pad_token_id=0,
            )
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers x 32 with the same word tokenizer: ``model.name`` of a causal task."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("causal")
    vocabulary = save_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
                tie_word_embeddings=True,
            )
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """Tiny checkpoints by the name of their transformers class, each built when it is first asked for."""
    from tests.architectures import build

    root = tmp_path_factory.mktemp("architectures")

    def folder_of(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            build(folder, name)
        return folder

    return folder_of


def save_tokenizer(folder: Path) -> int:
    """Save a word tokenizer that knows every word of the texts; return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *COMMON, *(word for words in CLASSES.values() for word in words)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session")
def minilm() -> Model:
    """The bundled MiniLM with the quickstart adapter and five classes; leave its tensors as they are."""
    from fedllm.config import RunConfig, TuningConfig
    from fedllm.models.model import load

    config = RunConfig(tuning=TuningConfig(targets=("query", "value")))
    return load(config, ("business", "entertainment", "politics", "sports", "tech"))
