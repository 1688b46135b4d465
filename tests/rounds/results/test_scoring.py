"""A run's model scored on texts of others: its own test set again, another run's, rows of a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedllm.errors import ConfigError, DataError, StoreError
from fedllm.runs.reader import Run
from simulations.api import open_run
from simulations.results.predict import predict
from simulations.results.scoring import evaluate
from strategies.session import Session
from tests.commands.conftest import Fedllm
from tests.commands.conftest import fedllm as fedllm  # a fixture
from tests.rounds.federation import configuration, run


@pytest.fixture(scope="module")
def first(tiny_encoder: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "first"
    run(configuration(tiny_encoder, tiny_texts, rounds=2), folder)
    return folder


@pytest.fixture(scope="module")
def second(first: Path, tiny_encoder: Path, tiny_texts: Path) -> Path:
    """A run of the same texts that holds out others."""
    run(configuration(tiny_encoder, tiny_texts, rounds=1, seed=5), first.parent / "second")
    return first.parent / "second"


def test_on_its_own_test_set_a_model_scores_what_the_run_says(first: Path) -> None:
    found = evaluate(first)
    told = Run(first).summary["metrics"]
    assert found.metrics == pytest.approx({name: told[name] for name in found.metrics})
    assert found.metrics["accuracy"] > 0
    assert (found.round, found.texts) == (2, len(Session(Run(first).config).split[1]))
    assert found.trained_on == 0


def test_on_anothers_it_is_right_where_its_predictions_are(first: Path, second: Path, tmp_path: Path) -> None:
    """Another run's held-out texts, as that run's folder and as rows of a file."""
    held_out = Session(Run(second).config).split[1]
    names = [held_out.label_names[int(label)] for label in held_out.labels]
    said = [answer["label"] for answer in predict(first, list(held_out.texts))]
    expected = sum(ours == theirs for ours, theirs in zip(said, names, strict=True)) / len(names)
    found = evaluate(first, second)
    assert found.metrics["accuracy"] == pytest.approx(expected)
    assert found.texts == len(held_out)
    learnt = set(Session(Run(first).config).split[0].texts)
    assert found.trained_on == len([text for text in held_out.texts if text in learnt]) > 0
    assert found.metrics != pytest.approx(evaluate(first).metrics)
    rows = tmp_path / "rows.jsonl"
    pairs = zip(held_out.texts, names, strict=True)
    rows.write_text("".join(json.dumps({"text": text, "label": name}) + "\n" for text, name in pairs))
    assert evaluate(first, rows).metrics == pytest.approx(found.metrics)
    some = [(text, name) for text, name in zip(held_out.texts, names, strict=True) if name == names[0]]
    rows.write_text("".join(json.dumps({"text": text, "label": name}) + "\n" for text, name in some))
    assert evaluate(first, rows).texts == len(some)  # though the file lacks classes


def test_the_command_says_it_in_a_line_and_as_json(first: Path, fedllm: Fedllm) -> None:
    code, out, _ = fedllm("evaluate", str(first), "--round", "1")
    assert code == 0
    assert out.startswith("accuracy ")
    assert out.endswith("texts, after round 1\n")
    code, out, _ = fedllm("evaluate", str(first), "--json")
    assert json.loads(out)["metrics"] == pytest.approx(evaluate(first).metrics)


def test_texts_that_were_changed_since_are_not_taken_for_those_held_out(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, fedllm: Fedllm
) -> None:
    texts = Path(shutil.copy(tiny_texts, tmp_path / "texts.jsonl"))
    run(configuration(tiny_encoder, texts, rounds=1), tmp_path / "run")
    _, out, _ = fedllm("evaluate", str(tmp_path / "run"), "--on", str(texts))
    assert f"{evaluate(tmp_path / 'run', texts).trained_on:,} of them stand among" in out
    with pytest.warns(UserWarning, match="texts stand among those that the run shares out for training"):
        open_run(tmp_path / "run").evaluate(texts)
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
    texts.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(StoreError, match=r"are not what .* was begun with"):
        evaluate(tmp_path / "run")
    code, out, _ = fedllm("evaluate", str(tmp_path / "run"), "--on", str(tiny_texts))
    assert code == 0
    assert "whether these are among them is not known" in out


def test_what_cannot_be_scored_is_refused(
    first: Path, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a pear", "label": "no such class"}) + "\n")
    with pytest.raises(DataError, match="no such class"):
        evaluate(first, rows)
    with pytest.raises(DataError, match=r"absent.jsonl"):
        evaluate(first, tmp_path / "absent.jsonl")
    fewer = tmp_path / "fewer.jsonl"
    texts = [json.loads(line) for line in tiny_texts.read_text().splitlines()]
    kept = sorted({str(row["label"]) for row in texts})[:2]
    fewer.write_text("".join(json.dumps(row) + "\n" for row in texts if str(row["label"]) in kept))
    run(configuration(tiny_encoder, fewer, rounds=1), tmp_path / "other")
    with pytest.raises(ConfigError, match="apart, and this run"):
        evaluate(first, tmp_path / "other")
