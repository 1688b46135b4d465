"""Files and folders become texts, and what is wrong with them is said with file and line."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fedllm.config import DataConfig, parse_override
from fedllm.data.corpus import load
from fedllm.errors import ConfigError, DataError
from tests.parts import task_of

ROWS = [
    {"body": "a b", "topic": "x"},
    {"body": "caf\u00e9, c", "topic": "y"},
    {"body": 'say "d"\nnow', "topic": "x"},
]


CSV = 'body,topic\r\na b,x\r\n"caf\u00e9, c",y\r\n"say ""d""\nnow",x\r\n'


def write(folder: Path, name: str, content: str | bytes) -> DataConfig:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataConfig(path=str(file), text="body", label="topic")


def gzipped(content: bytes) -> bytes:
    """The same bytes at every call: every pytest-xdist worker must collect the same test names."""
    return gzip.compress(content, mtime=0)


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
        config = write(tmp_path, "rows.csv", CSV)
    else:
        config = write(tmp_path, "rows.jsonl", "\ufeff" + jsonl(ROWS) + "\n")
    corpus = load(config, task_of("classification"))
    assert corpus.texts == [row["body"] for row in ROWS]
    assert corpus.label_names == ("x", "y")
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [0, 1, 0]
    assert corpus.groups is None


def test_whole_number_labels_are_ordered_by_value(tmp_path: Path) -> None:
    config = write(tmp_path, "n.jsonl", jsonl([{"body": "t", "topic": n} for n in (10, 9, 10)]))
    corpus = load(config, task_of("classification"))
    assert corpus.label_names == ("9", "10")
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 0, 1]


def test_one_clients_own_texts_are_numbered_by_the_federations_classes(tmp_path: Path) -> None:
    config = write(tmp_path, "own.jsonl", jsonl([{"body": "t", "topic": "y"}, {"body": "u", "topic": "z"}]))
    corpus = load(config, task_of("classification"), labels=("x", "y", "z"))
    assert corpus.label_names == ("x", "y", "z")
    assert corpus.labels is not None
    assert corpus.labels.tolist() == [1, 2]
    with pytest.raises(DataError, match="label 'y' is none of the federation's classes: x, z"):
        load(config, task_of("classification"), labels=("x", "z"))


def test_class_folders_decode_latin1_where_it_is_not_utf8(tmp_path: Path) -> None:
    for name, raw in {"pay/1.txt": b"\xa315", "pay/2.txt": b"\xc2\xa316", "war/1.txt": b"x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    corpus = load(DataConfig(path=str(tmp_path)), task_of("classification"))
    assert corpus.texts == ["\u00a315", "\u00a316", "x"]
    assert corpus.label_names == ("pay", "war")


def test_folder_of_files_keeps_which_file_each_text_came_from(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", jsonl(ROWS[:1]))
    write(tmp_path, "a.csv", "body,topic\nz,y\nq,y\n")
    config = DataConfig(path=str(tmp_path), text="body", label="topic", partition="file")
    corpus = load(config, task_of("classification"))
    assert corpus.texts == ["z", "q", "a b"]
    assert corpus.groups == ["a.csv", "a.csv", "b.jsonl"]


def test_natural_groups_come_from_their_column(tmp_path: Path) -> None:
    rows = [{"body": "t", "topic": "x", "who": who} for who in (3, 1, 3)]
    config = write(tmp_path, "n.jsonl", jsonl(rows))
    corpus = load(config.model_copy(update={"partition": "natural", "by": "who"}), task_of("classification"))
    assert corpus.groups == ["3", "1", "3"]


def test_causal_texts_need_no_label(tmp_path: Path) -> None:
    config = write(tmp_path, "c.jsonl", jsonl([{"body": "t"}, {"body": "u"}]))
    corpus = load(config, task_of("causal"))
    assert (corpus.texts, corpus.labels, corpus.label_names) == (["t", "u"], None, ())


def test_causal_texts_take_a_label_only_for_a_partition_by_class(tmp_path: Path) -> None:
    config = write(tmp_path, "c.jsonl", jsonl(ROWS))
    assert load(config, task_of("causal")).labels is None
    by_class = config.model_copy(update={"partition": "dirichlet"})
    assert load(by_class, task_of("causal")).label_names == ("x", "y")


@pytest.mark.parametrize("labels", [["ticket 1", "ticket 2"], [0.5, 1.5], [None, None], [["a"], {}]])
def test_labels_that_a_causal_run_does_not_use_are_not_looked_at(
    labels: list[object], tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [{"body": "t", "topic": label} for label in labels]
    assert load(write(tmp_path, "c.jsonl", jsonl(rows)), task_of("causal")).texts == ["t", "t"]


@pytest.mark.parametrize("body", [" ", "", None, float("nan"), "\u200b\u200b", "\x00\ufeff\n"])
def test_rows_without_text_are_left_out_and_counted(
    body: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS, {"body": body, "topic": "x"}, {"body": body, "topic": "y"}]
    with caplog.at_level(logging.WARNING):
        assert len(load(write(tmp_path, "b.jsonl", jsonl(rows)), task_of("classification"))) == 3
    assert "2 rows without text" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": "1", "data": ROWS}, indent=1)),
        ("a.json", jsonl(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2)),
        ("a.JSONL", jsonl(ROWS)),
        ("a.jsonl.gz", gzipped(jsonl(ROWS).encode())),
        ("a.json.gz", gzipped(json.dumps(ROWS).encode())),
        ("a.csv.gz", gzipped(CSV.encode())),
        ("a.tsv", 'body\ttopic\na b\tx\ncaf\u00e9, c\ty\n"say ""d""\nnow"\tx\n'),
        ("a.csv", CSV.replace("body,topic", " body, topic ")),
        ("a.csv", CSV.replace("\r\n", "\r")),
        ("a.csv", CSV.encode("utf-8-sig")),
        ("a.csv", CSV.encode("utf-16")),
        ("a.csv", b"\xfe\xff" + CSV.encode("utf-16-be")),
        ("a.csv", CSV.encode("utf-32")),
        ("a.jsonl", jsonl(ROWS).encode("utf-16")),
        ("a.csv.gz", gzipped(CSV.encode("utf-16"))),
    ],
)
def test_other_ways_to_write_the_same_rows(name: str, content: str | bytes, tmp_path: Path) -> None:
    corpus = load(write(tmp_path, name, content), task_of("classification"))
    assert corpus.texts == [row["body"] for row in ROWS]
    assert corpus.label_names == ("x", "y")


NO_DATA = [
    "._a.csv",
    ".~lock.a.csv#",
    ".~lock.a.csv",
    "~$a.csv",
    ".hidden.jsonl",
    "a.csv~",
    "#a.csv#",
    "a.csv.swp",
]


def test_what_editors_and_file_systems_leave_is_no_data(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", CSV)
    for name in NO_DATA:
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    for folder in (".ipynb_checkpoints", "__MACOSX", ".git"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "a.csv", CSV)
    corpus = load(DataConfig(path=str(tmp_path), text="body", label="topic"), task_of("classification"))
    assert corpus.texts == [row["body"] for row in ROWS]


def test_class_folders_hold_no_hidden_files(tmp_path: Path) -> None:
    for folder in ("pay", "war", ".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / folder).mkdir()
        for name in ("1.txt", "2.TXT", "._1.txt", ".~lock.1.txt", "notes.md"):
            (tmp_path / folder / name).write_text(f"{folder} {name}")
    corpus = load(DataConfig(path=str(tmp_path)), task_of("classification"))
    assert corpus.texts == ["pay 1.txt", "pay 2.TXT", "war 1.txt", "war 2.TXT"]


def test_a_text_file_says_its_encoding_by_its_mark(tmp_path: Path) -> None:
    (tmp_path / "pay").mkdir()
    (tmp_path / "pay" / "1.txt").write_bytes("\u00a315".encode("utf-16"))
    assert load(DataConfig(path=str(tmp_path)), task_of("classification")).texts == ["\u00a315"]


@pytest.mark.parametrize("name", ["b.csv", "pay/b.txt"])
@pytest.mark.parametrize("what", ["a link to nothing", "a folder", "no file"])
def test_what_is_named_like_data_and_is_none_is_refused(name: str, what: str, tmp_path: Path) -> None:
    """Left out, it would be missing from the training without a word."""
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    write(place.parent, "a" + place.suffix, CSV)
    if what == "a folder":
        place.mkdir()
    elif what == "no file":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=f"{place.name} is named like data but is {what}"):
        load(DataConfig(path=str(tmp_path)), task_of("classification"))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "pay/a.txt"])
def test_a_file_that_cannot_be_read_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **settings: Any) -> Any:
        if path.suffix == Path(name).suffix:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"a\.\w+.*(Permission denied|not a readable)"):
        load(DataConfig(path=str(tmp_path)), task_of("classification"))


def test_a_folder_that_cannot_be_listed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied"):
        load(DataConfig(path=str(tmp_path)), task_of("classification"))


def test_a_path_that_is_no_utf8_is_refused_with_the_key() -> None:
    """The configuration is sent and stored as UTF-8."""
    with pytest.raises(ConfigError, match=r"--set 'data.path=caf\\udce9.csv' is not UTF-8"):
        parse_override(b"data.path=caf\xe9.csv".decode(errors="surrogateescape"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load(DataConfig(path=str(tmp_path / "a.csv")), task_of("classification"))


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
        ("a.xlsx", "?", ["a.xlsx", ".jsonl, .json, .csv, .tsv, .parquet"]),
        (
            "a.jsonl",
            GOOD + '{"body": "t \\ud83d", "topic": "x"}\n',
            ["line 2", "'body'", "half a character", "\\ud83d"],
        ),
        ("a.jsonl", GOOD + '{"body": "t", "topic": "\\ude00"}\n', ["line 2", "'topic'", "half a character"]),
        ("a.jsonl", GOOD + '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", ["line 2", "nested too deeply"]),
        ("a.jsonl", GOOD + '{"x": ' + "9" * 5000 + "}\n", ["line 2", "more than 4,300 digits"]),
        ("a.jsonl", '[{"body": "t"}]\n', ["line 1", "not a list", ".json"]),
        ("a.json", '[{"body": "t",\n}]', ["a.json, line 2", "not valid JSON"]),
        ("a.json", '[{"body": "t", "topic": "x"}, 3]', ["a.json, record 2", "not int"]),
        ("a.json", '{"version": 1}', ["a.json", "a list of JSON objects is wanted"]),
        ("a.csv", "body,topic,body\nt,x,u\n", ["a.csv", "2 columns are called 'body'"]),
        ("a.csv", "body;topic\nt;x\n", ["a.csv", "'body;topic'", "commas"]),
        ("a.csv", 'body,topic\nt,x\n"never closed,x\n', ["a.csv, line 3", "not valid CSV"]),
        (
            "a.csv",
            "body,topic\nt,x\ncaf\u00e9,x\n".encode("latin-1"),
            ["a.csv, line 3", "not UTF-8", "byte 3", "save"],
        ),
        (
            "a.csv",
            b"\xff\xfe" + "body,topic\nt,x\n".encode("utf-16-le") + b"x",
            ["a.csv, line 3", "not UTF-16"],
        ),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00 no more", ["a.jsonl.gz", "cannot be read"]),
        ("a.jsonl.gz", gzipped(GOOD.encode() * 99)[:-20], ["a.jsonl.gz", "cannot be read"]),
        ("a.jsonl", '{"\\ud83d": "t"}\n', ["line 1", "the columns are \\ud83d"]),
        ("a.csv", ",".join(f"c{i}" for i in range(99)) + "\n" + "," * 98 + "\n", ["c11 and 87 more"]),
        ("a.csv", f"{'long ' * 99}\nt\n", ["the columns are long long long long long long long long "]),
        ("a.parquet.gz", b"?", ["a.parquet.gz", "no known kind"]),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    name: str, content: str | bytes, words: list[str], tmp_path: Path
) -> None:
    config = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load(config, task_of("classification"))
    for word in words:
        assert word in str(caught.value)


def test_parquet_names_the_row(tmp_path: Path) -> None:
    config = parquet(tmp_path, [*ROWS, {"body": "t", "topic": None}])
    with pytest.raises(DataError, match=r"rows\.parquet, row 4.*'topic' .* not empty"):
        load(config, task_of("classification"))


def test_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["t"])] * 3, names=["body", "topic", "body"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="2 columns are called 'body'"):
        load(DataConfig(path=str(tmp_path / "rows.parquet"), text="body"), task_of("classification"))


def test_missing_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(DataConfig(path=str(tmp_path / "nothing.jsonl")), task_of("classification"))
    with pytest.raises(DataError, match="neither"):
        load(DataConfig(path=str(tmp_path)), task_of("classification"))


def test_unknown_hub_name_says_what_is_bundled() -> None:
    with pytest.raises(DataError, match=r"'no/such-set' is not bundled \(bbcnews, bbc-entities, .*\)"):
        load(DataConfig(name="no/such-set"), task_of("classification"))


def test_hub_loader_reads_a_local_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets.load_dataset`` takes a folder like a hub repository: the same code path, offline."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", "train.jsonl", jsonl(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    corpus = load(DataConfig(name="./set", text="body", label="topic"), task_of("classification"))
    assert corpus.texts == [row["body"] for row in ROWS]


def test_bbc_news_is_whole() -> None:
    corpus = load(DataConfig(), task_of("classification"))
    assert corpus.label_names == ("business", "entertainment", "politics", "sports", "tech")
    assert corpus.labels is not None
    assert np.bincount(corpus.labels).tolist() == [510, 386, 417, 511, 401]
    assert not any("\ufffd" in text for text in corpus.texts)
