"""A run in Python is the run of the command line: same settings, same numbers, same sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from fedllm.errors import ConfigError, RunFailed, StoreError
from simulations.engines import loopback
from tests.commands.conftest import Fedllm
from tests.commands.conftest import fedllm as command  # noqa: F401


@pytest.mark.slow
def test_the_command_line_comes_to_the_same_numbers(
    command: Fedllm,  # noqa: F811
    finished: fedllm.Run,
    tiny_encoder: Path,
    tiny_texts: Path,
    tmp_path: Path,
) -> None:
    settings = (
        *(f"model.name={tiny_encoder}", f"data.path={tiny_texts}", "clients=2", "rounds=2"),
        *("data.max_length=16", "tuning.rank=2", 'tuning.targets=["query", "value"]'),
        *("training.local_steps=1", "training.batch_size=4", "training.learning_rate=0.05"),
    )
    words = [word for setting in settings for word in ("--set", setting)]
    answer = command("simulate", *words, "--out", tmp_path / "run", "--no-report", "--threads", 1, "--json")
    assert json.loads(answer.out)["state_sha256"] == finished.summary["state_sha256"]


def test_what_came_of_it(finished: fedllm.Run) -> None:
    lines = [json.loads(line) for line in (finished.folder / "rounds.jsonl").read_text().splitlines()]
    assert finished.rounds == lines
    assert [record["round"] for record in lines] == [0, 1, 2]
    assert finished.metrics["accuracy"] == lines[-1]["accuracy"]
    assert finished.labels == ("animal", "fruit", "metal")
    frame = finished.to_pandas()
    assert frame["accuracy"].to_dict() == {record["round"]: record["accuracy"] for record in lines}
    assert repr(finished).startswith(f"<Run {str(finished.folder)!r}: finished; ")
    assert fedllm.open_run(str(finished.folder)).metrics == finished.metrics


def test_without_pandas_there_is_a_sentence(finished: fedllm.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.extras.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run\.to_pandas\(\) needs pandas, which is not installed"):
        finished.to_pandas()


def test_its_model_answers_as_predict_does(finished: fedllm.Run) -> None:
    """Predict uses the run's own model, this one is loaded anew by transformers and peft."""
    from peft import PeftModel

    texts = ["one old apple", "we saw iron again near the copper"]
    model, tokenizer = finished.model(), finished.tokenizer()
    assert isinstance(model.backbone, PeftModel)
    with torch.inference_mode():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    for answer, row in zip(finished.predict(texts), logits.softmax(-1).tolist(), strict=True):
        assert list(answer["probabilities"].values()) == pytest.approx(row, abs=1e-5)
    assert finished.predict(texts[0]) == finished.predict(texts[:1])


def test_its_tokenizer_holds_no_length_of_ours(finished: fedllm.Run) -> None:
    backend = finished.tokenizer().backend_tokenizer
    assert (backend.truncation, backend.padding) == (None, None)


def test_settings_by_key_by_section_and_as_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "quickstart"\nrounds = 3\n[data]\npath = "{here}/texts.jsonl"\n')
    config = fedllm.load_config(file, {"training.local_steps": 4, "codec": {"up": "quantize(bits=8)"}})
    assert (config.name, config.rounds, config.training.local_steps) == ("mine", 3, 4)
    assert config.codec.up == "quantize(bits=8)"
    assert config.training.batch_size == fedllm.load_config("quickstart").training.batch_size
    assert config.data.path == str(tmp_path / "texts.jsonl")
    assert fedllm.load_config(config) == config
    assert fedllm.load_config(config, {"data.path": None, "data.name": "bbcnews"}).data.path is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"training.local_step": 4}, "unknown key training.local_step; did you mean local_steps?"),
        ({"rounds": 0}, "rounds = 0 is not allowed"),
        ({"training": {"seed": 1}, "training.seed": 2}, "training.seed is given twice: give it once"),
        ({"fedkd.teachers": 2}, "unknown key fedkd.teachers"),
        ({"name.first": "x"}, "name.first: name is a value, not a section"),
        ({"mezo.radius": 1e-2}, "mezo.radius is for method = 'mezo', and this run's is 'lora'"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_wrong_settings_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        fedllm.load_config("quickstart", settings)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"round": 4}, "unknown key round; did you mean rounds?"),
        ({"settings": {"rounds": 3}, "rounds": 4}, "rounds is given twice: give it once"),
        ({"engine": "ray"}, "--engine is loopback or flower, not 'ray'"),
        ({"workers": 0}, "--workers is at least 1, not 0"),
        ({"device": "tpu"}, "--device (or FEDLLM_DEVICE) is one of"),
        ({"source": "quickstat"}, "'quickstat' is neither a TOML file nor a preset"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value),
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    arguments: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        fedllm.simulate(**arguments)
    assert str(refused.value).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_begins_from_the_result_of_another(
    finished: fedllm.Run, small: dict[str, Any], rows: list[dict[str, str]], tiny_texts: Path, tmp_path: Path
) -> None:
    given = {**small, "data": tiny_texts, "rounds": 1, "init_from": finished.folder}
    run = fedllm.simulate(out=tmp_path / "run", **given)
    end = finished.metrics
    assert {name: run.rounds[0][name] for name in end} == pytest.approx(end, abs=1e-6)
    for texts in (tiny_texts, rows):
        with pytest.raises(StoreError, match="lies where the new run would: choose another --out"):
            fedllm.simulate(out=finished.folder, overwrite=True, **{**given, "data": texts})
    assert finished.status == "finished"


def test_a_folder_that_is_taken(finished: fedllm.Run, small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds a finished run: choose another --out, or give --overwrite"):
        fedllm.simulate(out=finished.folder, **small)
    with pytest.raises(StoreError, match=r"run\.db"):
        fedllm.open_run(tmp_path)


def test_a_run_that_was_stopped_is_no_success(
    small: dict[str, Any], tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody stops it on the dashboard; it goes on with the numbers that it would have had."""
    folder = tmp_path / "run"
    pull = loopback.LoopbackGrid.pull_messages

    def stop_at_once(grid: Any, identifiers: Any) -> Any:
        if grid._pushed == 4:
            from fedllm.runs.reader import Run

            Run(folder).post_command("stop", "somebody")
        return pull(grid, identifiers)

    monkeypatch.setattr(loopback.LoopbackGrid, "pull_messages", stop_at_once)
    with pytest.raises(RunFailed, match=r"stopped before the last round; go on with: fedllm resume \S+run"):
        fedllm.simulate(out=folder, data=tiny_texts, **small)
    assert fedllm.open_run(folder).status == "stopped"


def test_a_finished_run_goes_on(
    finished: fedllm.Run, small: dict[str, Any], tiny_texts: Path, tmp_path: Path
) -> None:
    run = fedllm.simulate(out=tmp_path / "run", data=tiny_texts, **{**small, "rounds": 1})
    assert run.resume(threads=1, progress=False).summary == run.summary
    assert run.extend(1, threads=1, report=False, progress=False).config.rounds == 2
    assert run.summary["state_sha256"] == finished.summary["state_sha256"]
    with pytest.raises(StoreError, match="cannot go on to 1"):
        run.resume(rounds=1, progress=False)
