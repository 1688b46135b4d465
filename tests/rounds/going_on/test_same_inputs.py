"""A run goes on with the texts, weights and tokenizer that it was begun with, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedllm.config import RunConfig
from fedllm.data.corpus import Corpus
from fedllm.data.digests import of_model, of_texts
from fedllm.errors import DataError, StoreError
from fedllm.runs.reader import Run
from simulations.results.predict import restore
from strategies import session as session
from tests.rounds.federation import configuration, run


@pytest.fixture
def begun(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> RunConfig:
    """The configuration of a run in ``tmp_path / "run"`` that was interrupted in round 2."""
    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    texts = shutil.copy(tiny_texts, tmp_path / "texts.jsonl")
    config = configuration(model, texts, rounds=3)

    def interrupt(message: Message) -> Message:
        if message.metadata.group_id == "2":
            raise KeyboardInterrupt
        return message

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", interrupt)
    session.forget_sessions()  # as in another process
    return config


def another_text(folder: Path) -> None:
    path = folder / "texts.jsonl"
    path.write_text(path.read_text().replace("otter", "heron", 1), encoding="utf-8")


def another_class(folder: Path) -> None:
    with (folder / "texts.jsonl").open("a") as file:
        file.writelines('{"text": "the old oak", "label": "tree"}\n' for _ in range(12))


def a_text_that_none_can_split(folder: Path) -> None:
    with (folder / "texts.jsonl").open("a") as file:
        file.write('{"text": "the old oak", "label": "tree"}\n')


def other_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def another_tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"otter"', '"salmon"'), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_text, r"the texts of \S+texts\.jsonl are not what \S+run was begun with: bring back"),
        pytest.param(another_class, r"the texts of \S+texts\.jsonl are not", marks=pytest.mark.slow),
        pytest.param(
            a_text_that_none_can_split,
            "a single text .*; it did not stand in the run.s way when it was begun",
            marks=pytest.mark.slow,
        ),
        (other_weights, r"the weights of \S+model are not what \S+run was begun with: bring back"),
        (another_tokenizer, r"the tokenizer of \S+model is not what"),
    ],
)
def test_a_run_does_not_go_on_with_other_things(
    change: Callable[[Path], None], named: str, begun: RunConfig, tmp_path: Path
) -> None:
    def contents() -> dict[str, bytes]:
        files = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files if "run.db-" not in path.name}

    before = contents()
    change(tmp_path)
    with pytest.raises((StoreError, DataError), match=named):
        run(begun, tmp_path / "run")
    assert contents() == before


@pytest.mark.slow
def test_the_same_things_in_other_files_are_the_same(begun: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(dict(reversed(row.items()))) + "\n" for row in lines))
    (tmp_path / "model" / "README.md").write_text("moved")
    assert run(begun, tmp_path / "run")["status"] == "finished"
    assert "inputs" not in {event.kind for event in Run(tmp_path / "run").events()}


@pytest.mark.slow
def test_a_run_goes_on_in_another_place(begun: RunConfig, tmp_path: Path) -> None:
    whole = run(begun, shutil.copytree(tmp_path / "run", tmp_path / "whole"))
    (tmp_path / "archive").mkdir()
    moved = (tmp_path / "run").rename(tmp_path / "archive" / "moved")
    assert run(begun, moved)["state_sha256"] == whole["state_sha256"]
    assert not (tmp_path / "run").exists()
    restore(moved)


@pytest.mark.slow
def test_a_run_without_digests_goes_on_and_says_so(begun: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "run" / "provenance.json"
    told = json.loads(path.read_text())
    assert set(told.pop("inputs")) == {"texts", "partition", "weights", "tokenizer"}
    path.write_text(json.dumps(told))
    assert run(begun, tmp_path / "run")["status"] == "finished"
    (event,) = [event for event in Run(tmp_path / "run").events() if event.kind == "inputs"]
    assert "data and model go unchecked" in event.message


def test_a_model_is_not_asked_on_top_of_other_weights(begun: RunConfig, tmp_path: Path) -> None:
    restore(tmp_path / "run")
    other_weights(tmp_path)
    with pytest.raises(StoreError, match="the weights of"):
        restore(tmp_path / "run")


def test_digests_tell_apart_what_joins_to_the_same_bytes() -> None:
    def digest(texts: list[str], numbers: list[int] | None = None) -> str:
        labels = None if numbers is None else np.array(numbers, dtype=np.int64)
        corpus = Corpus(texts, labels, (), None)
        return of_texts(corpus, corpus, [])["texts"]

    told = [
        digest(["ab", "c"]),
        digest(["a", "bc"]),
        digest(["ab", "c"], [0, 1]),
        digest(["ab", "c"], [1, 0]),
    ]
    told += [digest(["abc"]), digest(["abc", ""]), digest(["\udcff"])]
    assert len(set(told)) == len(told)
    parts = [[np.array([0, 1])], [np.array([0]), np.array([1])], [np.array([1]), np.array([0])]]
    empty = Corpus([], None, (), None)
    assert len({of_texts(empty, empty, part)["partition"] for part in parts}) == 3


def test_a_gguf_file_is_weights_and_tokenizer_in_one(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert set(of_model(str(tmp_path / "model.gguf"))) == {"weights"}
    assert of_model("no/such-model") == {}


def test_the_files_of_another_student_are_inputs_too(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Its trained tensors would be put on other frozen embeddings."""
    student = shutil.copytree(tiny_encoder, tmp_path / "model")
    options = {"student": str(student)}
    config = configuration(tiny_encoder, tiny_texts, rounds=1, method="fedkd", tuning={}, options=options)
    run(config, tmp_path / "run")
    assert restore(tmp_path / "run").round == 1
    other_weights(tmp_path)
    with pytest.raises(StoreError, match=r"the weights of \S+model are not what \S+run was begun with"):
        restore(tmp_path / "run")
