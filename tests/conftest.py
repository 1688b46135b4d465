"""Tiny models and texts, built in code, that load through the same doors as real ones."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

# Read when transformers is first imported: no test looks for anything on a network.
os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")

from fedllm.config import RunConfig, TuningConfig
from fedllm.models import Model, load

CLASSES = {
    "fruit": ["apple", "pear", "plum", "melon", "cherry", "grape"],
    "metal": ["iron", "copper", "zinc", "silver", "nickel", "lead"],
    "animal": ["horse", "otter", "heron", "lynx", "badger", "trout"],
}
"""Each class has words of its own, so that a few steps of training tell them apart."""

COMMON = ["the", "a", "we", "saw", "one", "old", "new", "today", "and", "again", "near", "here"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = _save_tokenizer(folder)
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
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("causal")
    vocabulary = _save_tokenizer(folder)
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


def _save_tokenizer(folder: Path) -> int:
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
    config = RunConfig(tuning=TuningConfig(targets=("query", "value")))
    return load(config, ("business", "entertainment", "politics", "sports", "tech"))
