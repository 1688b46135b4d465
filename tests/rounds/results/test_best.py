"""The result of the best round lies beside that of the last, and is what its checkpoint holds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from fedllm.data.tokens import Batch
from fedllm.errors import ConfigError, RunFailed, StoreError
from fedllm.models.model import Model
from fedllm.models.readback import require_true
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from simulations.results.predict import export, predict, restore
from tests.rounds.federation import configuration, let_measure, run

METHODS = {"lora": ("adapter", "adapter_model.safetensors"), "fedavg": ("model", "model.safetensors")}


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return partial(let_measure, monkeypatch)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded back and found to be the run's model; to ``refuse`` is found to be another one."""
    found: list[str] = []

    def check(model: Model, place: Path, batch: Batch) -> None:
        if "refuse" in found and place.name.endswith("-best"):
            raise RunFailed(f"{place} is not the run's model")
        require_true(model, place, batch)
        found.append(place.name)

    monkeypatch.setattr("server.rounds.conduct.require_true", check)
    return found


def files(place: Path) -> dict[str, bytes]:
    """What lies there, but for what no two runs share: whose key signed, and bytes of times in messages."""
    own = rb"- (signed|moved): .*"
    return {path.name: re.sub(own, b"", path.read_bytes()) for path in place.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_result_of_the_best_round_is_that_of_its_checkpoint(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, scores: Any, compared: list[str], method: str
) -> None:
    name, weights = METHODS[method]
    folder = tmp_path / "run"
    scores(0.1, 0.8, 0.5, 0.8)
    summary = run(
        configuration(tiny_encoder, tiny_texts, rounds=3, clients=2, server={}, method=method), folder
    )
    assert summary["best"] == {"round": 1, "metric": "accuracy", "value": 0.8, "accuracy": 0.8}
    assert compared == [name, f"{name}-best"]
    best = folder / f"{name}-best"
    held = checkpoint.load(folder / "checkpoints", 1).groups["tensors"]
    last = checkpoint.load(folder / "checkpoints", 3).groups["tensors"]
    for written in (load_file(best / weights) | load_file(best / "head.safetensors")).values():
        assert any(torch.equal(written, tensor) for tensor in held.values() if tensor.shape == written.shape)
    assert not torch.equal(held["head.weight"], last["head.weight"])
    card = (best / "README.md").read_text()
    assert "## Scores after 1 of 3 rounds\n\n- accuracy: 0.8\n" in card
    assert "No round of this run has a better accuracy." in card
    assert "No round of this run" not in (folder / name / "README.md").read_text()
    made = export(folder, tmp_path / "out", "best")
    assert files(made)[weights] == files(best)[weights]
    assert files(made)["README.md"] == files(best)["README.md"]
    texts = ["one old apple", "iron"]
    assert predict(folder, texts, "best") == predict(folder, texts, 1) != predict(folder, texts)
    assert not list(folder.glob(".adapter*"))


@pytest.mark.slow
def test_where_the_last_round_is_the_best_both_results_are_the_same(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, scores: Any, compared: list[str]
) -> None:
    scores(0.1, 0.8)
    run(configuration(tiny_encoder, tiny_texts, rounds=1), tmp_path / "run")
    assert files(tmp_path / "run" / "adapter-best") == files(tmp_path / "run" / "adapter")
    assert compared == ["adapter"]  # the copy needs no second base
    assert (
        "No round of this run has a better accuracy."
        in files(tmp_path / "run" / "adapter")["README.md"].decode()
    )


def test_without_evaluation_there_is_no_best_round(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(configuration(tiny_encoder, tiny_texts, rounds=1, evaluation={"every": 0}), folder)
    assert not (folder / "adapter-best").exists()
    assert Run(folder).best is None
    with pytest.raises(StoreError, match="run has measured no accuracy and so has no best round"):
        restore(folder, "best")


def test_a_metric_that_these_texts_do_not_give_is_refused_before_the_first_round(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, scores: Any
) -> None:
    """What a task measures can depend on the texts: where one has several classes there is no mcc."""
    scores(0.5)
    config = configuration(tiny_encoder, tiny_texts, rounds=1, evaluation={"metric": "mcc"})
    sentence = "evaluation.metric = 'mcc' is not measured on this test set, but accuracy: name one of these"
    with pytest.raises(ConfigError, match=sentence):
        run(config, tmp_path / "run")
    assert (Run(tmp_path / "run").rounds(), Run(tmp_path / "run").status) == ([], "failed")


@pytest.mark.slow
def test_a_stop_leaves_the_result_of_the_best_round_so_far(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, scores: Any
) -> None:
    config = configuration(tiny_encoder, tiny_texts, rounds=3)
    scores(0.1, 0.8, 0.5, 0.9)
    run(config, tmp_path / "whole")
    folder = tmp_path / "run"

    def stop(message: Message) -> Message:
        if message.metadata.group_id == "2":
            Run(folder).post_command("stop", by="test")
        return message

    scores(0.1, 0.8, 0.5)
    assert run(config, folder, stop)["status"] == "stopped"
    assert "## Scores after 1 of 3 rounds" in (folder / "adapter-best" / "README.md").read_text()
    scores(0.9)
    assert run(config, folder)["status"] == "finished"
    assert files(folder / "adapter-best") == files(tmp_path / "whole" / "adapter-best")
    assert (Run(folder).best or [None])[0] == 3


@pytest.mark.slow
def test_a_best_round_whose_checkpoint_is_gone_is_a_warning(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, scores: Any
) -> None:
    """As in runs that an earlier version began."""
    folder = tmp_path / "run"
    scores(0.1, 0.8, 0.5)
    run(configuration(tiny_encoder, tiny_texts, rounds=2), folder)
    shutil.rmtree(folder / "checkpoints" / "round-000001")
    scores(0.6)
    with Run(folder).extended(3) as config:
        summary = run(config, folder)
    assert (summary["status"], summary["best"]["round"]) == ("finished", 1)
    assert not (folder / "adapter-best").exists()
    (warning,) = [event.message for event in Run(folder).events() if event.kind == "warning"]
    assert warning.startswith("the result of the best round, 1, cannot be saved: checkpoint ")


@pytest.mark.slow
def test_a_best_result_that_is_not_the_runs_model_fails_it(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, scores: Any, compared: list[str]
) -> None:
    folder = tmp_path / "run"
    scores(0.8, 0.5)
    compared.append("refuse")
    with pytest.raises(RunFailed, match="adapter-best is not the run's model"):
        run(configuration(tiny_encoder, tiny_texts, rounds=1), folder)
    assert Run(folder).status == "failed"
    assert not (folder / "adapter-best").exists()
