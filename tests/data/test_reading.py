"""Files and folders become texts, and what is wrong with them is said with file and line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fedllm.config import DataConfig
from fedllm.data import load
from fedllm.errors import DataError

ROWS = [
    {"body": "a b", "topic": "x"},
    {"body": "caf\u00e9, c", "topic": "y"},
    {"body": 'say "d"\nnow', "topic": "x"},
]


def write(folder: Path, name: str, content: str | bytes) -> DataConfig:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataConfig(path=str(file), text="body", label="topic")


def jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(folder: Path, rows: list[dict[str, object]]) -> DataConfig:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return DataConfig(path=str(folder / "rows.parquet"), text="body", label="topic")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_same_rows_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        config = parquet(tmp_path, ROWS)
    elif kind == "csv":
        lines = 'body,topic\r\na b,x\r\n"caf\u00e9, c",y\r\n"say ""d""\nnow",x\r\n'
        config = write(tmp_path, "rows.csv", lines)
    else:
        config = write(tmp_path, "rows.jsonl", "\ufeff" + jsonl(ROWS) + "\n")
    corpus = load(config, "classification")
    assert corpus.texts == [row["body"] for row in ROWS]
    assert corpus.label_names == ("x", "y")
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [0, 1, 0]
    assert corpus.groups is None


def test_whole_number_labels_are_ordered_by_value(tmp_path: Path) -> None:
    config = write(tmp_path, "n.jsonl", jsonl([{"body": "t", "topic": n} for n in (10, 9, 10)]))
    corpus = load(config, "classification")
    assert corpus.label_names == ("9", "10")
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 0, 1]


def test_one_clients_own_texts_are_numbered_by_the_federations_classes(tmp_path: Path) -> None:
    config = write(tmp_path, "own.jsonl", jsonl([{"body": "t", "topic": "y"}, {"body": "u", "topic": "z"}]))
    corpus = load(config, "classification", labels=("x", "y", "z"))
    assert corpus.label_names == ("x", "y", "z")
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="label 'y' is none of the federation's classes: x, z"):
        load(config, "classification", labels=("x", "z"))


def test_class_folders_decode_latin1_where_it_is_not_utf8(tmp_path: Path) -> None:
    for name, raw in {"pay/1.txt": b"\xa315", "pay/2.txt": b"\xc2\xa316", "war/1.txt": b"x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    corpus = load(DataConfig(path=str(tmp_path)), "classification")
    assert corpus.texts == ["\u00a315", "\u00a316", "x"]
    assert corpus.label_names == ("pay", "war")


def test_folder_of_files_keeps_which_file_each_text_came_from(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", jsonl(ROWS[:1]))
    write(tmp_path, "a.csv", "body,topic\nz,y\nq,y\n")
    config = DataConfig(path=str(tmp_path), text="body", label="topic", partition="file")
    corpus = load(config, "classification")
    assert corpus.texts == ["z", "q", "a b"]
    assert corpus.groups == ["a.csv", "a.csv", "b.jsonl"]


def test_natural_groups_come_from_their_column(tmp_path: Path) -> None:
    rows = [{"body": "t", "topic": "x", "who": who} for who in (3, 1, 3)]
    config = write(tmp_path, "n.jsonl", jsonl(rows))
    corpus = load(config.model_copy(update={"partition": "natural", "by": "who"}), "classification")
    assert corpus.groups == ["3", "1", "3"]


def test_causal_texts_need_no_label(tmp_path: Path) -> None:
    config = write(tmp_path, "c.jsonl", jsonl([{"body": "t"}, {"body": "u"}]))
    corpus = load(config, "causal")
    assert (corpus.texts, corpus.labels, corpus.label_names) == (["t", "u"], None, ())


def test_causal_texts_keep_a_label_for_the_partition(tmp_path: Path) -> None:
    corpus = load(write(tmp_path, "c.jsonl", jsonl(ROWS)), "causal")
    assert corpus.label_names == ("x", "y")


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write(
        tmp_path, "b.jsonl", jsonl([*ROWS, {"body": " ", "topic": "x"}, {"body": "", "topic": "y"}])
    )
    with caplog.at_level(logging.WARNING):
        assert len(load(config, "classification")) == 3
    assert "2 rows without text" in caplog.text


GOOD = '{"body": "t", "topic": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD + '{"body": "t", \n', ["a.jsonl, line 2", "not valid JSON"]),
        ("a.jsonl", GOOD + "\n[1]\n", ["a.jsonl, line 3", "JSON object", "list"]),
        ("a.jsonl", GOOD.encode() + b'{"body": "\xa3"}\n', ["a.jsonl, line 2", "UTF-8", "byte 10"]),
        ("a.jsonl", GOOD + '{"text": "t", "topic": "x"}\n', ["line 2", "'body' (data.text)", "text, topic"]),
        ("a.jsonl", GOOD + '{"body": "t"}\n', ["line 2", "'topic' (data.label)", "columns are body"]),
        ("a.jsonl", GOOD + '{"body": 7, "topic": "x"}\n', ["line 2", "'body' is not text but int 7"]),
        ("a.jsonl", GOOD + '{"body": null, "topic": "x"}\n', ["line 2", "'body' is not text but empty"]),
        (
            "a.jsonl",
            GOOD + '{"body": "t", "topic": 0.5}\n',
            ["line 2", "'topic'", "whole number", "float 0.5"],
        ),
        ("a.jsonl", GOOD + '{"body": "t", "topic": null}\n', ["line 2", "'topic'", "empty"]),
        ("a.jsonl", GOOD + '{"body": "t", "topic": 1}\n', ["mixes whole numbers and names"]),
        ("a.jsonl", "", ["a.jsonl", "no text"]),
        ("a.csv", "body,topic\nt,x\nu\n", ["a.csv, line 3", "1 fields", "2 columns"]),
        ("a.csv", 'body,topic\n"t\nu",x\nv,x,y\n', ["a.csv, line 4", "3 fields"]),
        ("a.csv", 'body,topic\n"t"u,x\n', ["a.csv, line 2", "not valid CSV"]),
        ("a.csv", b"body,topic\nt,x\n\xa3,x\n", ["a.csv", "UTF-8"]),
        ("a.csv", "body,topic\nt,0.5\nu,1.25\n", ["fractions such as 0.5"]),
        ("a.csv", "title,topic\nt,x\n", ["line 2", "'body'", "title, topic"]),
        ("a.parquet", "not parquet", ["a.parquet", "not a readable parquet file"]),
        ("a.xlsx", "?", ["a.xlsx", ".jsonl, .csv, .parquet"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    name: str, content: str | bytes, words: list[str], tmp_path: Path
) -> None:
    config = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load(config, "classification")
    for word in words:
        assert word in str(caught.value)


def test_parquet_names_the_row(tmp_path: Path) -> None:
    config = parquet(tmp_path, [*ROWS, {"body": None, "topic": "x"}])
    with pytest.raises(DataError, match=r"rows\.parquet, row 4.*'body' is not text but empty"):
        load(config, "classification")


def test_missing_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(DataConfig(path=str(tmp_path / "nothing.jsonl")), "classification")
    with pytest.raises(DataError, match="neither"):
        load(DataConfig(path=str(tmp_path)), "classification")


def test_unknown_hub_name_says_what_is_bundled() -> None:
    with pytest.raises(DataError, match=r"'no/such-set' is not bundled \(bbcnews\)"):
        load(DataConfig(name="no/such-set"), "classification")


def test_hub_loader_reads_a_local_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets.load_dataset`` takes a folder like a hub repository: the same code path, offline."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", "train.jsonl", jsonl(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    corpus = load(DataConfig(name="./set", text="body", label="topic"), "classification")
    assert corpus.texts == [row["body"] for row in ROWS]


def test_bbc_news_is_whole() -> None:
    corpus = load(DataConfig(), "classification")
    assert corpus.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert corpus.labels is not None
    assert np.bincount(corpus.labels).tolist() == [510, 386, 417, 511, 401]
    assert not any("\ufffd" in text for text in corpus.texts)
