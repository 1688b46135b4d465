"""Whole runs with BitFit and bottleneck adapters: they resume, answer and leave an adapter like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from fedllm.models import extra_adapters
from simulations.results.predict import predict, restore
from tests.parts import quick
from tests.rounds.federation import configuration, run

FORWARD: dict[str, Any] = {"method": "fwdllm", "options": {"directions": 4, "warm_start": "means"}}


METHODS: dict[str, dict[str, Any]] = {"lora": {"method": "lora"}, "fwdllm": FORWARD}
CASES = [(peft, method) for peft in extra_adapters.NAMES for method in METHODS]


@pytest.mark.slow
@pytest.mark.parametrize(("peft", "method"), quick(CASES, ("bottleneck", "lora")))
def test_a_run_from_start_to_answer(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, peft: str, method: str
) -> None:
    config = configuration(
        tiny_encoder, tiny_texts, rounds=2, tuning={"peft": peft, "rank": 2}, **METHODS[method]
    )
    folder = tmp_path / "run"
    run(config, folder)
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    model = restore(folder).model
    answers = predict(folder, ["one old apple and a pear today", "iron near the copper"])
    assert all(set(answer["probabilities"]) == {"fruit", "metal", "animal"} for answer in answers)

    base = extra_adapters.load(AutoModel.from_pretrained(tiny_encoder), folder / "adapter").eval()
    head = load_file(folder / "adapter" / "head.safetensors")
    encoded = model.tokenizer("iron near the copper", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        pooled = base(**encoded).last_hidden_state.mean(1)
        unit = pooled / pooled.norm(dim=-1, keepdim=True)
        logits = unit * pooled.shape[-1] ** 0.5 @ head["weight"].T + head["bias"]
    want = dict(zip(model.labels, logits.softmax(-1)[0].tolist(), strict=True))
    assert answers[1]["probabilities"] == pytest.approx(want, rel=1e-4)
