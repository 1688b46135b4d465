"""Loading, reading, writing, evaluating and saving models; the cache of converted files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fedllm.config import DataConfig, ModelConfig, RunConfig, TuningConfig
from fedllm.data import bundled
from fedllm.data.corpus import load as load_texts
from fedllm.data.tokens import Tokens
from fedllm.errors import ModelError
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model, load
from fedllm.models.saving import save
from fedllm.tasks.metrics import classified
from fedllm.tensors import fingerprint

LABELS = ("animal", "fruit", "metal")

Build = Callable[..., Model]


@pytest.fixture
def build(tiny_encoder: Path, tiny_causal: Path, tiny_texts: Path) -> Build:
    def build(task: Any = "classification", peft: str = "lora", **settings: Any) -> Model:
        base = tiny_causal if task == "causal" else tiny_encoder
        config = RunConfig(
            model=ModelConfig(**{"name": str(base), "task": task, **settings}),
            data=DataConfig(path=str(tiny_texts), max_length=12),
            tuning=TuningConfig(peft=peft, rank=4),
        )
        return load(config, LABELS)

    return build


def tokens_of(model: Model) -> Tokens:
    return model.task.encode(load_texts(model.config.data, model.task), model.tokenizer, 12)


def test_write_then_read_returns_the_same_bits(build: Build) -> None:
    model = build()
    values = {n: torch.randn_like(t) for n, t in model.read().items()}
    identity = {n: id(p) for n, p in model.trainable().items()}
    model.write(values)
    assert fingerprint(model.read()) == fingerprint(values)
    assert {n: id(p) for n, p in model.trainable().items()} == identity


def test_read_is_a_copy(build: Build) -> None:
    model = build()
    values = model.read()
    values["head.weight"].zero_()
    assert model.trainable()["head.weight"].abs().sum() > 0
    assert not any(t.requires_grad for t in values.values())


def test_write_refuses_other_names_and_shapes_and_changes_nothing(build: Build) -> None:
    model = build()
    good = {n: t + 1 for n, t in model.read().items()}
    before = fingerprint(model.read())
    missing = {n: t for n, t in good.items() if n != "head.bias"}
    with pytest.raises(ModelError, match=r"head\.bias is missing"):
        model.write(missing)
    with pytest.raises(ModelError, match="other is unknown"):
        model.write(good | {"other": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"head\.weight: its shape is \(3, 32\), not \(32, 3\)"):
        model.write(good | {"head.weight": good["head.weight"].T})
    assert fingerprint(model.read()) == before


def test_full_model_trains_everything_that_is_used(build: Build) -> None:
    model = build(peft="full")
    names = set(model.trainable())
    assert names == {n for n, _ in model.module.named_parameters()}
    assert not any("pooler" in n for n in names)
    loss = model.forward(tokens_of(model).batch(range(8))).loss
    assert loss is not None
    loss.backward()
    assert all(p.grad is not None for p in model.trainable().values())


def test_tied_weights_are_one_tensor(build: Build) -> None:
    names = build("causal", peft="full").trainable()
    assert "backbone.model.embed_tokens.weight" in names
    assert "backbone.lm_head.weight" not in names


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_evaluate_agrees_with_text_by_text(build: Build, task: str) -> None:
    model = build(task)
    tokens = tokens_of(model).subset(range(37))
    total, count = 0.0, 0
    answers: list[int] = []
    with torch.no_grad():
        if model.module.head is not None:  # no class is to be everybody's
            model.module.head.bias -= model.forward(tokens.batch(range(37))).logits.mean(0)
        for index in range(len(tokens)):
            ids, mask, labels, _ = tokens.batch([index])
            logits = model.module(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
            if task == "causal":
                total -= sum(logits[0, i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1))
                count += ids.shape[1] - 1
            else:
                total -= logits[0, labels[0]].item()
                count += 1
                answers.append(int(logits.argmax()))
    expected = {"loss": total / count}
    if task == "causal":
        expected["perplexity"] = math.exp(total / count)
    else:
        assert tokens.labels is not None
        assert len(set(answers)) > 1
        expected |= classified(tokens.labels, np.array(answers), model.labels)
    for batch_size in (1, 8, 64):
        assert evaluate(model, tokens, batch_size) == pytest.approx(expected, rel=1e-5)
    assert model.module.training


def test_a_vocabularys_logits_bound_a_batch(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("causal")
    tokens = tokens_of(model).subset(range(37))
    assert [len(batch) for batch in model.batches(tokens, 16)] == [16, 16, 5]
    monkeypatch.setattr("fedllm.models.model._LOGITS", 40 * (model.embeddings or 0))
    found = list(model.batches(tokens, 16))
    assert sorted(np.concatenate(found)) == list(range(37))
    longest = [int(tokens.lengths[batch].max()) for batch in found]
    assert longest == sorted(longest)
    assert all(len(batch) * width <= 40 for batch, width in zip(found, longest, strict=True))
    assert sum(len(batch) == 40 // width for batch, width in zip(found, longest, strict=True)) >= 3
    monkeypatch.setattr("fedllm.models.model._LOGITS", 1)
    assert [len(batch) for batch in model.batches(tokens, 16)] == [1] * 37
    assert [len(batch) for batch in build().batches(tokens, 16)] == [
        16,
        16,
        5,
    ]  # classes are no vocabulary


def test_evaluate_switches_dropout_off_and_on_again(build: Build) -> None:
    model = build(dropout=0.5)
    tokens = tokens_of(model).subset(range(20))
    assert evaluate(model, tokens, 8) == evaluate(model, tokens, 8)
    assert model.module.training


def test_evaluate_needs_texts(build: Build) -> None:
    model = build()
    with pytest.raises(ModelError, match="no text"):
        evaluate(model, tokens_of(model).subset([]), 8)


def test_a_few_steps_learn_the_classes(build: Build) -> None:
    model = build()
    tokens = tokens_of(model)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=3e-2)
    for step in range(40):
        loss = model.forward(tokens.batch(np.arange(step * 16, step * 16 + 16) % 180)).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert evaluate(model, tokens.subset(range(180, 240)), 32)["accuracy"] > 0.8


def test_full_models_load_with_plain_transformers(build: Build, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = build(peft="full")
    place = save(model, tmp_path)
    assert place == tmp_path / "model"
    plain = AutoModel.from_pretrained(place, add_pooling_layer=False)
    batch = tokens_of(model).batch(range(3))
    hidden = model.forward(batch, hidden_states=True).hidden_states
    assert hidden is not None
    stock = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    torch.testing.assert_close(stock, hidden[-1])
    assert AutoTokenizer.from_pretrained(place)("apple")["input_ids"] == model.tokenizer("apple")["input_ids"]
    assert set(load_file(place / "head.safetensors")) == {"weight", "bias"}
    assert json.loads((place / "fedllm.json").read_text())["labels"] == list(LABELS)


def test_a_saved_tokenizer_cuts_and_pads_nothing(build: Build, tmp_path: Path) -> None:
    """Read by tokenizers itself, as programs without transformers do."""
    model = build("causal", peft="full")
    text = "the old apple and the new apple " * 4
    whole = model.tokenizer(text)["input_ids"]
    model.tokenizer([text, "apple"], truncation=True, max_length=4, padding="max_length")
    words = Tokenizer.from_file(str(save(model, tmp_path) / "tokenizer.json"))
    assert words.encode(text).ids == whole
    assert len(words.encode("apple").ids) < 4


def test_a_saved_model_is_a_base_model_again(build: Build, tmp_path: Path) -> None:
    place = save(build("causal", peft="full"), tmp_path)
    again = build("causal", name=str(place))
    batch = tokens_of(again).batch(range(4))
    torch.testing.assert_close(again.forward(batch).loss, build("causal").forward(batch).loss)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "no/such-model"}, ["'no/such-model' cannot be loaded", "minilm, smollm2"]),
        ({"name": "missing.gguf"}, ["'missing.gguf'", "no such GGUF file"]),
    ],
)
def test_unknown_models_are_explained(build: Build, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        build(**settings)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_is_no_causal_model_and_a_broken_folder_no_model(build: Build, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded for classification"):
        build(name=str(tmp_path))


def test_texts_longer_than_the_model_can_take(tiny_encoder: Path) -> None:
    config = RunConfig(model=ModelConfig(name=str(tiny_encoder)), data=DataConfig(max_length=65))
    with pytest.raises(ModelError, match=r"data\.max_length = 65 exceeds the 64 tokens"):
        load(config, LABELS)


def test_one_class_is_not_a_classification(tiny_encoder: Path) -> None:
    config = RunConfig(model=ModelConfig(name=str(tiny_encoder)))
    with pytest.raises(ModelError, match="at least two classes; the data has only"):
        load(config, ("only",))


@pytest.mark.parametrize("pooling", ["mean", "own"])
def test_loading_says_nothing(build: Build, pooling: str, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    chatter: Any = logging
    before = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    build(pooling=pooling)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == before


def test_conversion_happens_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    calls: list[Path] = []

    def half(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "_dequantise", half)
    with pytest.raises(KeyboardInterrupt):
        bundled.convert_gguf(file)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []

    def whole(source: Path, folder: Path) -> None:
        calls.append(source)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(bundled, "_dequantise", whole)
    folder = bundled.convert_gguf(file)
    assert [item.name for item in folder.iterdir()] == ["config.json"]
    assert bundled.convert_gguf(file) == folder
    assert calls == [file]
    file.write_bytes(b"GGUF, another")
    assert bundled.convert_gguf(file) != folder


def test_two_conversions_at_once_leave_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    rounds: list[Path] = []

    def slow(source: Path, folder: Path) -> None:
        rounds.append(folder)
        (folder / "who").write_text(str(len(rounds)))
        if len(rounds) == 1:
            bundled.convert_gguf(file)  # the other process comes in between, and finishes first

    monkeypatch.setattr(bundled, "_dequantise", slow)
    folder = bundled.convert_gguf(file)
    assert (folder / "who").read_text() == "2"
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_gguf_file_is_explained(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"not a model at all")
    with pytest.raises(ModelError, match=r"m\.gguf cannot be read as a GGUF language model"):
        build("causal", name=str(tmp_path / "m.gguf"))
