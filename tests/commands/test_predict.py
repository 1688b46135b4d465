"""Texts come from the command line, standard input or a file; what is exported is a folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from fedllm.data.reading import Row
from tests.commands.conftest import Fedllm
from tests.parts import task_of
from tests.reports.made_up import make_run


class _Pipe:
    """Standard input that holds these bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is asked; it knows one class."""
    texts: list[str] = []

    def answer(folder: Path, given: list[str], round: int | None) -> list[dict[str, object]]:
        texts.extend(given)
        return [{"text": text, "label": "news", "probabilities": {"news": 1.0}} for text in given]

    monkeypatch.setattr("simulations.results.predict.predict", answer)
    shown = task_of("classification").shown
    monkeypatch.setattr("simulations.results.predict.lines", lambda folder, answers: map(shown, answers))
    return texts


def test_texts_stand_on_the_command_line(fedllm: Fedllm, asked: list[str]) -> None:
    answer = fedllm("predict", "run", "one text", "--", "- another")
    assert asked == ["one text", "- another"]
    assert answer.out == "news\t1.000\tone text\nnews\t1.000\t- another\n"


def test_a_hyphen_reads_standard_input(
    fedllm: Fedllm, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", _Pipe("one\r\n\nü three".encode()))
    told = json.loads(fedllm("predict", "run", "-", "--json").out)
    assert asked == ["one", "", "ü three"]  # a line each, so that answers can be counted off
    assert [one["text"] for one in told] == asked


def test_a_file_holds_one_text_a_line(fedllm: Fedllm, asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("\ufeffone\u2028still one\ntwo\n", encoding="utf-8")
    assert fedllm("predict", "run", "--file", tmp_path / "texts").code == 0
    assert asked == ["one\u2028still one", "two"]


@pytest.mark.parametrize(
    ("content", "words", "sentence"),
    [
        (b"", ["-"], "standard input holds no text: give one a line"),
        (b"ok\n\xff\xfe", ["-"], "standard input is not UTF-8 (byte 3): convert it, one text a line"),
        (b"", [], "predict needs texts, - for standard input, or --file FILE"),
        (b"", ["text", "--file", "f"], "predict takes texts or --file, not both"),
        (b"", ["--file", "nowhere"], "cannot read nowhere: No such file or directory"),
    ],
)
def test_what_is_no_text_is_one_sentence(
    fedllm: Fedllm,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr("sys.stdin", _Pipe(content))
    assert fedllm("predict", "run", *words) == (2, "", f"error: {sentence}\n")
    assert asked == []


@pytest.mark.parametrize("name", ["model.gguf", "adapter.safetensors", "MODEL.GGUF"])
def test_a_file_cannot_be_exported(fedllm: Fedllm, tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run")
    answer = fedllm("export", tmp_path / "run", tmp_path / name)
    assert answer.code == 2
    assert answer.err.startswith("error: export writes a folder")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("round", [None, 0, 7, "best"])
def test_a_round_names_a_checkpoint(
    fedllm: Fedllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, round: int | str | None
) -> None:
    given: list[int | str | None] = []
    words = () if round is None else ("--round", round)
    monkeypatch.setattr(
        "simulations.results.predict.predict", lambda run, texts, round: given.append(round) or []
    )
    monkeypatch.setattr("simulations.results.predict.lines", lambda run, answers: answers)
    monkeypatch.setattr("simulations.results.predict.export", lambda run, out, round: given.append(round))
    assert fedllm("predict", "run", "a text", *words).code == 0
    assert fedllm("export", tmp_path, tmp_path / "out", *words).code == 0
    assert given == [round, round]


@pytest.mark.parametrize("said", ["-1", "last", "1.5", "best "])
def test_what_is_no_round_is_refused(fedllm: Fedllm, said: str) -> None:
    answer = fedllm("predict", "run", "a text", "--round", said)
    sentence = f"error: --round takes the number of a round, or best; got {said!r}\n"
    assert (answer.code, answer.err) == (2, sentence)


def test_export_says_where_it_wrote(fedllm: Fedllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.results.predict.export", lambda run, out, round: out.mkdir())
    out = tmp_path / "llama-3.2"  # a version is no ending of a file
    assert json.loads(fedllm("export", tmp_path, out, "--json").out) == {"written": str(out)}
    assert (
        fedllm("export", tmp_path, out).err == f"error: {out} exists already; choose a folder that does not\n"
    )


def test_a_table_is_read_by_rows(fedllm: Fedllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "shares rose"}\n', encoding="utf-8")
    given: list[Row] = []

    def answer(run: Path, rows: list[Row], round: int | None) -> list[dict[str, object]]:
        given.extend(rows)
        return []

    monkeypatch.setattr("simulations.results.predict.predict", answer)
    assert fedllm("predict", "run", "--json", "--file", tmp_path / "good.jsonl").code == 0
    assert [row.columns for row in given] == [{"text": "shares rose"}]
