"""Texts and models from memory: the same run as from files, which another process can go on with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from flwr.app import Message
from transformers import AutoTokenizer, BertModel

import fedllm
from fedllm.config import DataConfig
from fedllm.data.corpus import load
from fedllm.data.given import check, write
from fedllm.data.given import rows as rows_of
from fedllm.errors import DataError, FedllmError, ModelError
from simulations.engines import loopback
from tests.parts import task_of

Rows = list[dict[str, str]]


def as_dataset(rows: Rows) -> datasets.Dataset:
    """With numbered classes, in an order that is not the alphabet's."""
    names = ["metal", "animal", "fruit"]
    return datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=names))


@pytest.mark.parametrize("made", [list, iter, pandas.DataFrame, as_dataset], ids=lambda kind: kind.__name__)
def test_a_table_is_the_file_of_its_rows(
    made: Callable[[Rows], Any], rows: Rows, tiny_texts: Path, tmp_path: Path
) -> None:
    config = DataConfig(path=str(tmp_path / "texts.jsonl"), partition="natural", by="author")
    write(rows_of(made(rows), "data"), config, (), tmp_path / "texts.jsonl")
    given = load(config, task_of("classification"))
    read = load(config.model_copy(update={"path": str(tiny_texts)}), task_of("classification"))
    assert (given.texts, given.label_names, given.groups) == (read.texts, read.label_names, read.groups)
    assert given.labels is not None
    assert read.labels is not None
    assert given.labels.tolist() == read.labels.tolist()


def test_numbers_and_gaps_of_numpy_and_pandas(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"text": ["a", None, "b"], "label": pandas.array([10, 9, None], dtype="Int64")})
    rows = rows_of(frame, "data")
    assert [row.columns["label"] for row in rows] == [10, 9, None]
    assert rows[1].columns["text"] is None
    (row,) = rows_of([{"text": np.str_("a"), "label": np.float32(2.0), "weight": np.nan}], "data")
    assert row.columns == {"text": "a", "label": 2.0, "weight": None}


def test_checking_says_nothing_that_the_run_is_going_to_say(caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of([{"text": "a", "label": "x"}, {"text": "", "label": "y"}], "data")
    check(fedllm.RunConfig(), task_of("classification"), rows)
    assert caplog.messages == []
    load(DataConfig(), task_of("classification"), rows=rows)
    assert caplog.messages == ["1 rows without text, or with nothing to learn in them, were left out"]


def test_only_columns_that_a_setting_names_are_written(tmp_path: Path) -> None:
    row = {"text": "a", "label": "x", "secret": object()}
    write(rows_of([row], "data"), DataConfig(), (), tmp_path / "texts.jsonl")
    assert (tmp_path / "texts.jsonl").read_text() == '{"text": "a", "label": "x"}\n'


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"data": []}, "data: there is no row in it"),
        ({"data": 7}, "data is of type int, but rows are wanted: a list of dicts, a pandas frame or"),
        ({"data": ["a", "b"]}, "data, row 1 is of type str, but rows are wanted"),
        ({"data": datasets.DatasetDict({"a": datasets.Dataset.from_list([])})}, "data is several splits (a)"),
        (
            {"data": [{"body": "a"}]},
            "data, row 1: there is no column 'text' (data.text); the columns",
        ),
        ({"data": [{"text": "a", "label": 1.5}]}, "data, row 1: column 'label' (data.label) must hold a"),
        ({"data": {"rows": [{"text": "a"}], "path": "x"}}, "path = 'x' and what is given from memory are"),
        (
            {"clients": [[{"text": "a"}]], "data": [{"text": "a"}]},
            "clients are given with the texts of",
        ),
        ({"clients": [[{"text": "a", "label": "x"}], []]}, "clients[1]: there is no row in it"),
        ({"clients": []}, "clients = 0 is not allowed"),
        ({"model": 7}, "the model that was given is of type int, but a transformers model"),
        ({"model": {"object": lambda: None}}, "the model that was given is of type NoneType"),
    ],
    ids=range(12),
)
def test_what_is_no_data_and_no_model_is_one_sentence(
    arguments: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(FedllmError) as refused:
        fedllm.simulate(out=tmp_path / "run", progress=False, **arguments)
    assert str(refused.value).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def test_what_was_laid_out_is_taken_back_where_the_run_does_not_begin(
    small: dict[str, Any], rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        fedllm.simulate(out=tmp_path / "run", data=rows, **{**small, "model": "/nowhere/at/all"})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(FedllmError, match="holds other things"):
        fedllm.simulate(out=tmp_path / "run", data=rows, **small)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_each_client_has_the_texts_that_it_was_given(
    small: dict[str, Any], rows: Rows, tmp_path: Path
) -> None:
    renamed = [{"words": row["text"], "kind": row["label"]} for row in rows]
    clients = [renamed[:100], pandas.DataFrame(renamed[100:130])]
    data = {"text": "words", "label": "kind", "test_rows": renamed[130:]}
    run = fedllm.simulate(out=tmp_path / "run", data=data, **{**small, "clients": clients, "rounds": 1})
    told = run._stored.partition
    assert [client["indices"] for client in told["clients"]] == [[*range(100)], [*range(100, 130)]]
    assert (run.config.clients, len(told["held_out"])) == (2, 110)


@pytest.mark.slow
def test_the_same_folder_with_other_texts_is_another_run(
    small: dict[str, Any], rows: Rows, tmp_path: Path
) -> None:
    """Its configuration is the same, its texts lie at the same path: nothing may be kept from before."""
    settings = {**small, "rounds": 1, "out": tmp_path / "run"}
    first = fedllm.simulate(data=rows, **settings).summary["state_sha256"]
    changed = [{**row, "label": rows[index - 1]["label"]} for index, row in enumerate(rows)]
    second = fedllm.simulate(data=changed, overwrite=True, **settings).summary["state_sha256"]
    assert first != second
    assert fedllm.simulate(data=rows, overwrite=True, **settings).summary["state_sha256"] == first


@pytest.mark.slow
def test_a_model_from_memory_is_the_model_of_its_folder(
    small: dict[str, Any], finished: fedllm.Run, rows: Rows, tiny_encoder: Path, tmp_path: Path
) -> None:
    def build() -> tuple[BertModel, Any]:
        return BertModel.from_pretrained(tiny_encoder), AutoTokenizer.from_pretrained(tiny_encoder)

    run = fedllm.simulate(out=tmp_path / "run", data=rows, **{**small, "model": build})
    assert run.summary["state_sha256"] == finished.summary["state_sha256"]
    moved = fedllm.open_run((tmp_path / "run").rename(tmp_path / "moved"))
    assert moved.predict("an apple")[0]["probabilities"] == finished.predict("an apple")[0]["probabilities"]


def test_a_model_without_a_tokenizer_says_how_to_give_one(
    tiny_encoder: Path, rows: Rows, tmp_path: Path
) -> None:
    model = BertModel.from_pretrained(tiny_encoder)
    model.name_or_path = ""
    with pytest.raises(ModelError, match=r'give it too: model=\{"object": model, "tokenizer": tokenizer\}'):
        fedllm.simulate(out=tmp_path / "run", data=rows, model=model, progress=False)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_wherever_its_folder_lies(
    small: dict[str, Any], finished: fedllm.Run, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = loopback.LoopbackGrid.pull_messages

    def interrupt(grid: Any, identifiers: Iterable[str]) -> list[Message]:
        replies = list(pull(grid, identifiers))
        if any(reply.metadata.group_id == "2" for reply in replies):
            raise KeyboardInterrupt
        return replies

    with monkeypatch.context() as patch:
        patch.setattr(loopback.LoopbackGrid, "pull_messages", interrupt)
        with pytest.raises(KeyboardInterrupt) as pressed:
            fedllm.simulate(out=tmp_path / "run", data=rows, **small)
    assert pressed.value.__notes__ == [f"go on with: fedllm.open_run({str(tmp_path / 'run')!r}).resume()"]
    moved = fedllm.open_run(shutil.move(tmp_path / "run", tmp_path / "moved"))
    assert (moved.status, len(moved.rounds)) == ("stopped", 2)
    assert moved.resume(threads=1, report=False, progress=False).status == "finished"
    assert moved.summary["state_sha256"] == finished.summary["state_sha256"]


def test_a_run_does_not_go_on_with_other_texts_from_memory(finished: fedllm.Run, tmp_path: Path) -> None:
    run = fedllm.open_run(shutil.copytree(finished.folder, tmp_path / "run"))
    run._stored.go_on_from(1)
    texts = run.folder / "given" / "texts.jsonl"
    texts.write_text(texts.read_text().replace("otter", "heron", 1))
    with pytest.raises(FedllmError, match=r"the texts of \S+ are not what \S+run was begun with"):
        run.resume(progress=False)
    run._stored.go_on_from(1)  # what was refused was taken back
    shutil.rmtree(run.folder / "given")
    with pytest.raises(DataError, match=r"texts\.jsonl' does not exist"):
        run.resume(progress=False)
