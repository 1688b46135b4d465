"""``fedllm export --format``: what other runtimes load says what the run's own model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.errors import ConfigError, RunFailed
from simulations.results import shipping
from simulations.results.options import Format
from simulations.results.predict import plain_model, tokenizer
from simulations.results.shipping import ship
from tests.parts import quick
from tests.rounds.federation import configuration, run

TEXTS = ["the apple and one old pear", "zinc", "we saw a heron near the otter again today"]


def trained(base: Path, texts: Path, folder: Path, **sections: Any) -> Path:
    run(configuration(base, texts, rounds=1, method="lora", **sections), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def encoder_run(tiny_encoder: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_encoder, tiny_texts, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def causal_run(tiny_causal: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tuned = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "v_proj")}
    model = {"name": str(tiny_causal), "task": "causal"}
    return trained(tiny_causal, tiny_texts, tmp_path_factory.mktemp("causal"), tuning=tuned, model=model)


def own_logits(folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Tokens of a few texts, and what the run's model says of those that are no padding."""
    asked = tokenizer(folder)(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        logits = plain_model(folder)(**asked).logits
    return asked, logits if logits.dim() == 2 else logits[asked["attention_mask"].bool()]


def in_onnx_runtime(place: Path, asked: dict[str, Any]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(place / "model.onnx", providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(["logits"], {name: asked[name].numpy() for name in asked})[0])
    return logits if logits.dim() == 2 else logits[asked["attention_mask"].bool()]


def test_a_merged_model_needs_no_peft(causal_run: Path, tmp_path: Path) -> None:
    place, _ = ship(causal_run, tmp_path / "out", "merged")
    asked, ours = own_logits(causal_run)
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(place)(**asked).logits[asked["attention_mask"].bool()]
    torch.testing.assert_close(loaded, ours, rtol=1e-4, atol=1e-5)
    assert "lora" not in " ".join(AutoModelForCausalLM.from_pretrained(place).state_dict())
    assert "AutoModelForCausalLM.from_pretrained" in (place / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder_run", "causal_run"])
def test_a_graph_says_what_the_run_says_at_any_size(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    place, compared = ship(folder, tmp_path / "out", "onnx", check=True)
    asked, ours = own_logits(folder)
    torch.testing.assert_close(in_onnx_runtime(place, asked), ours, rtol=1e-4, atol=1e-5)
    assert compared is not None
    assert compared.score == pytest.approx(compared.run_score, rel=1e-4)
    assert compared.difference < 1e-4
    assert json.loads((place / "fedllm.json").read_bytes())["runtime"] == "onnxruntime"


@pytest.mark.slow
def test_eight_bits_are_smaller_and_said_to_differ(encoder_run: Path, tmp_path: Path) -> None:
    whole, _ = ship(encoder_run, tmp_path / "whole", "onnx")
    place, compared = ship(encoder_run, tmp_path / "small", "int8", check=True)
    assert (place / "model.onnx").stat().st_size < (whole / "model.onnx").stat().st_size
    assert compared is not None
    assert 1e-4 < compared.difference < 0.5


@pytest.mark.slow
def test_a_student_is_a_plain_model_already(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    run(configuration(tiny_encoder, tiny_texts, rounds=1, method="fedkd"), tmp_path / "run")
    place, compared = ship(tmp_path / "run", tmp_path / "out", "merged", check=True)
    assert (place / "model.safetensors").exists()
    assert compared is not None
    assert compared.score == compared.run_score


@pytest.mark.slow
def test_what_differs_is_not_left_behind(
    encoder_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "_difference", lambda *_: 0.01)
    with pytest.raises(RunFailed, match=r"its scores are 1\.0% off"):
        ship(encoder_run, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_else_lies_in_the_folder_stays(
    encoder_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").touch()
    with monkeypatch.context() as patched:
        patched.setattr(shipping, "_difference", lambda *_: 0.01)
        with pytest.raises(RunFailed):
            ship(encoder_run, tmp_path, "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    ship(encoder_run, tmp_path, "merged")
    with pytest.raises(ConfigError, match="exists already"):
        ship(encoder_run, tmp_path, "merged")


@pytest.mark.parametrize("form", quick(["merged", "onnx"], "merged"))
def test_an_adapter_that_no_weights_can_hold_is_refused(
    form: Format, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    folder = trained(tiny_encoder, tiny_texts, tmp_path, tuning={"peft": "bottleneck", "rank": 2})
    with pytest.raises(ConfigError, match=r'tuning\.peft = "bottleneck" is none'):
        ship(folder, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
