"""Lists and objects in rows, tagged sentences and SQuAD's own files, from whatever holds them."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fedllm.config import DataConfig
from fedllm.data import given
from fedllm.data.corpus import load
from fedllm.data.reading import Row, read_rows
from fedllm.data.shapes.answers import Answers, answers, candidates
from fedllm.data.shapes.conversations import messages
from fedllm.data.shapes.entities import tagged
from fedllm.errors import DataError
from tests.parts import task_of

ODD = "\u202b\u0645\u0631\u062d\u202c \r\n\x00\ufeff \U0001f469\u200d\U0001f467 \u2028e\u0301" + "x" * 40_000
ROWS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": f"Hi {k}"}, {"role": "assistant", "content": ODD}],
        "tokens": ["to", ODD, ""],
        "tags": ["O", "B-city", "O"],
        "question": "q",
        "context": f"{ODD} c",
        "answers": {"text": ["c"], "answer_start": [len(ODD) + 1]},
        "query": "q",
        "candidates": ["a", ODD],
        "clicks": [0, 1],
    }
    for k in range(2)
]


def read(path: Path) -> list[Row]:
    return list(read_rows(DataConfig(path=str(path))))


def jsonl(path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def cells(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        for row in ROWS:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": jsonl,
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    "a.parquet": parquet,
    "a.csv": cells,
}


@pytest.mark.parametrize("name", WRITERS)
def test_lists_and_objects_come_whole_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    rows = read(tmp_path / name)
    assert len(rows) == len(ROWS)
    for row, wrote in zip(rows, ROWS, strict=True):
        assert messages(row) == wrote["messages"]
        assert tagged(row) == (wrote["tokens"], wrote["tags"], 0)
        assert answers(row) == ("q", wrote["context"], [("c", len(ODD) + 1)])
        assert candidates(row) == ("q", wrote["candidates"], wrote["clicks"])


SENTENCES = [
    (["In", "S\u00e3o", "Paulo", "\u05e2\u05d5"], ["O", "B-geo-loc", "I-geo-loc", "O"]),
    (["#", "O"], ["O", "O"]),
]


def conll(separator: str, between: str, columns: int = 2) -> str:
    middle = ["NN", "B-NP"][: columns - 2]
    return between.join(
        "".join(separator.join([word, *middle, tag]) + "\n" for word, tag in zip(*sentence, strict=True))
        for sentence in SENTENCES
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.conll", conll("\t", "\n")),
        ("a.iob", conll(" ", "\n")),
        ("a.iob2", conll("  ", "\n\n\n")),
        ("a.bio", conll("\t", "\t\n")),
        ("a.conll", "\ufeff" + conll("\t", "\n").replace("\n", "\r\n")),
        ("a.conll", conll("\t", "\n").rstrip("\n")),
        ("a.conll", "-DOCSTART- -X- -X- O\n\n" + conll(" ", "\n-DOCSTART- -X- -X- O\n\n", 4)),
        ("a.conll.gz", gzip.compress(conll("\t", "\n").encode(), mtime=0)),
    ],
)
def test_tagged_sentences(name: str, content: str | bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = read(tmp_path / name)
    assert [(row.columns["tokens"], row.columns["tags"]) for row in rows] == SENTENCES
    assert {row.file for row in rows} == {name}


def test_a_tagged_sentence_says_where_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("\n\na\tO\nb\tO\n\n\nc\tX\n")
    assert [row.where for row in read(tmp_path / "a.conll")] == [
        f"{tmp_path}/a.conll, line {n}" for n in (3, 7)
    ]
    with pytest.raises(DataError, match=r"a\.conll, line 7: column 'tags': str X is no tag"):
        [tagged(row) for row in read(tmp_path / "a.conll")]


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "in Rio.",
                    "qas": [
                        {"id": "1", "question": "Where?", "answers": [{"text": "Rio", "answer_start": 3}]},
                        {"id": "2", "question": "Who?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "x", "qas": [{"id": "3", "question": "What?"}]},
            ],
        },
        {"title": "U", "paragraphs": []},
    ],
}


def test_squads_own_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD))
    with caplog.at_level(logging.INFO):
        rows = read(tmp_path / "dev.json")
    assert caplog.messages == [
        f"{tmp_path}/dev.json is read as SQuAD's own: a question of a paragraph is a row"
    ]
    assert [answers(row) for row in rows] == [
        Answers("Where?", "in Rio.", [("Rio", 3)]),
        Answers("Who?", "in Rio.", []),
        Answers("What?", "x", []),
    ]
    assert [(row.columns["id"], row.columns["title"]) for row in rows] == [("1", "T"), ("2", "T"), ("3", "T")]
    assert rows[1].where == f"{tmp_path}/dev.json, record 1, paragraph 1, question 2"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.conll", "a\tO\nb\n", ["a.conll, line 2: 1 fields", "as in the lines before, 2"]),
        ("a.conll", "a\n", ["a.conll, line 1: 1 fields", "a word, a tab or a space, and its tag"]),
        ("a.conll", "a\tO\n\tO\n", ["a.conll, line 2: 1 fields"]),
        ("a.conll", "a\tO\n\n# text = b c\n", ["a.conll, line 3: 5 fields"]),
        ("a.conll", b"a\tO\n\xa3\tO\n", ["a.conll, line 2", "not UTF-8"]),
        ("a.json", '{"data": [{"paragraphs": {}}]}', ["a.json, record 1", '"paragraphs" must be a list']),
        ("a.json", '[{"paragraphs": [{"qas": [3]}]}]', ["record 1, paragraph 1", '"qas" must be a list']),
        (
            "a.json",
            '[{"paragraphs": [{"context": "x", "qas": [{"question": "q", "answers": ["x"]}]}]}]',
            ["record 1, paragraph 1, question 1", '"answers" must be a list of objects'],
        ),
        (
            "a.json",
            '[{"paragraphs": [{"qas": [{"question": "q", "answers": []}]}, {"context": "x"}]}]',
            ["record 1, paragraph 2", '"qas" must be a list'],
        ),
        ("a.txt", "a\tO\n", ["a.txt", ".conll"]),
    ],
)
def test_what_is_wrong_with_them_is_said_with_its_place(
    name: str, content: str | bytes, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    for word in words:
        assert word in str(caught.value)


def test_an_answer_that_squad_misplaces_is_said_with_its_place(tmp_path: Path) -> None:
    wrong = json.dumps(SQUAD).replace('"answer_start": 3', '"answer_start": 2')
    (tmp_path / "dev.json").write_text(wrong)
    with pytest.raises(DataError, match=r"record 1, paragraph 1, question 1: .*'Rio' does not stand at 2"):
        [answers(row) for row in read(tmp_path / "dev.json")]


def test_shapes_of_conversations_are_said_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.jsonl"
    shapes = [{"prompt": "p", "response": "r"}, {"instruction": "i", "output": "o"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*shapes, *shapes]))
    with caplog.at_level(logging.INFO):
        assert len(load(DataConfig(path=str(file)), task_of("instruct"))) == 4
    assert caplog.messages == [
        f"conversations are read from prompt and response ({file}, line 1)",
        f"conversations are read from instruction, input and output ({file}, line 2)",
    ]


def test_tags_of_a_data_set_have_names() -> None:
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    rows = datasets.Dataset.from_dict({"tokens": [["a", "b"], []], "tags": [[1, 0], []]}, features=features)
    read_ones = given.rows(rows, "data")
    assert [row.columns["tags"] for row in read_ones] == [["B-x", "O"], []]


def test_lists_in_memory_become_plain() -> None:
    import pandas

    frame = pandas.DataFrame(
        {"tokens": [np.array(["a", "b"], dtype=object)], "clicks": [(np.int64(1), np.nan)]}
    )
    (row,) = given.rows(frame, "data")
    assert row.columns == {"tokens": ["a", "b"], "clicks": [1, None]}
    (row,) = given.rows([{"turn": {"n": np.array([[1, 2]]), 3: np.float32(0.5)}}], "data")
    assert json.dumps(row.columns) == '{"turn": {"n": [[1, 2]], "3": 0.5}}'
