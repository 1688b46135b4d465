"""A run's model answers as it was trained: one way to read texts, whatever stands beside them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fedllm.errors import DataError, ModelError
from simulations.results.predict import predict, restore
from tests.architectures import Architecture
from tests.parts import quick
from tests.rounds.federation import configuration, run

Finished = Callable[..., Path]
"""Runs one round on a base model and returns the run folder."""

SHORT, LONG = "iron near the copper", "we saw one old apple and a pear today and again a plum near the horse"


@pytest.fixture
def finished(tiny_texts: Path, tmp_path: Path) -> Finished:
    def finish(base: Path, task: str = "classification", max_length: int = 12, **sections: Any) -> Path:
        sections = {"tuning": {"rank": 2}, **sections}
        data = {"path": str(tiny_texts), "max_length": max_length, "partition": "iid"}
        model = {"name": str(base), "task": task, "pooling": sections.pop("pooling", "mean")}
        run(configuration(base, tiny_texts, rounds=1, data=data, model=model, **sections), tmp_path / "run")
        return tmp_path / "run"

    return finish


def alone(folder: Path, text: str) -> list[float]:
    """Probabilities by hand: the tokens of one text, cut, without any padding."""
    model = restore(folder).model
    ids = model.tokenizer(text, truncation=True, max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return list(logits.softmax(-1)[0].tolist())


BASES = [("RobertaModel", "mean"), ("BertModel", "cls"), ("GPT2LMHeadModel", "own")]


@pytest.mark.parametrize(("name", "pooling"), quick(BASES, BASES[0]))
def test_a_text_has_one_answer_whatever_stands_beside_it(
    architecture: Architecture, finished: Finished, tmp_path: Path, name: str, pooling: str
) -> None:
    base = shutil.copytree(architecture(name), tmp_path / "left")
    tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(base).padding_side == "left"
    folder = finished(base, pooling=pooling)
    for asked in ([SHORT], [SHORT, LONG], [LONG, SHORT]):
        for answer in predict(folder, asked):
            given = list(answer["probabilities"].values())
            assert given == pytest.approx(alone(folder, answer["text"]), abs=1e-6)
            assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].__getitem__)


@pytest.mark.slow
def test_texts_that_the_run_would_leave_out_are_left_out(
    tiny_encoder: Path, finished: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    folder = finished(tiny_encoder)
    with caplog.at_level(logging.WARNING):
        answers = predict(folder, ["", SHORT, " \n", LONG])
    assert [answer["text"] for answer in answers] == [SHORT, LONG]
    assert "left out for having no text: 2 of 4" in caplog.messages
    with pytest.raises(DataError, match="no text to answer"):
        predict(folder, [" "])
    with pytest.raises(DataError, match="half a character"):
        predict(folder, ["apple \ud800"])


def test_a_long_text_is_cut_where_training_cuts_it(tiny_encoder: Path, finished: Finished) -> None:
    folder = finished(tiny_encoder)
    beginning = "old apple " * 6
    whole, cut = predict(folder, [beginning + "iron " * 500, beginning])
    assert whole["probabilities"] == pytest.approx(cut["probabilities"], abs=1e-6)


@pytest.mark.slow
def test_more_texts_than_a_batch_holds(tiny_encoder: Path, finished: Finished) -> None:
    folder = finished(tiny_encoder, evaluation={"batch_size": 2})
    asked = [SHORT, LONG, "a horse", "one pear", "zinc"]
    together = predict(folder, asked)
    assert [answer["text"] for answer in together] == asked
    for answer in together:
        assert answer["probabilities"] == pytest.approx(
            predict(folder, [answer["text"]])[0]["probabilities"], abs=1e-6
        )


@pytest.mark.slow
def test_a_text_is_continued_from_its_last_word(architecture: Architecture, finished: Finished) -> None:
    """The tokenizer ends texts, GPT-2 has 64 positions: neither that end nor what is far back is seen."""
    folder = finished(architecture("GPT2LMHeadModel"), "causal")
    model = restore(folder).model
    words = model.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    for text, ids in ((LONG, [2, *words]), (f"{LONG} " * 10, words * 10)):
        expected = list(ids)
        with torch.no_grad():
            for _ in range(40):
                seen = torch.tensor([expected[-64:]])
                best = int(model.module(seen, torch.ones_like(seen)).logits[0, -1].argmax())
                if best == 3:
                    break
                expected.append(best)
        (answer,) = predict(folder, [text])
        # The words of this tokenizer stand apart, the first of them from the text too.
        new = model.tokenizer.decode(expected[len(ids) :], skip_special_tokens=True)
        assert answer["continuation"] == (f" {new}" if new else "")


def test_a_special_token_without_an_embedding_is_named(
    architecture: Architecture, finished: Finished, tmp_path: Path
) -> None:
    base = shutil.copytree(architecture("LlamaForCausalLM"), tmp_path / "padded")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    tokenizer.save_pretrained(base)
    folder = finished(base)
    with pytest.raises(DataError, match=r"text 1 holds the token '<PAD>', for which model\.name"):
        predict(folder, [SHORT, "an apple <PAD> today"])


@pytest.mark.parametrize("peft", quick(["prompt", "prefix"], "prompt"))
def test_virtual_tokens_take_positions_too(architecture: Architecture, finished: Finished, peft: str) -> None:
    with pytest.raises(ModelError, match=r"max_length = 50 and the 20 virtual tokens .* exceed the 64"):
        finished(architecture("BertModel"), tuning={"peft": peft}, max_length=50)
