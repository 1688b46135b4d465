"""``model.prune``: what is masked is zero after every round and in the result, and never travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.prune import l1_unstructured
from transformers import AutoModel

from fedllm.config import RunConfig
from fedllm.config.model import pruning
from fedllm.errors import ModelError
from fedllm.models.compression.masks import mask
from fedllm.runs import checkpoint
from tests.rounds.federation import configuration, cut, run

OWN: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg"},
    "fedkd": {"method": "fedkd", "options": {"layers": 1}},
}


def masked(encoder: Path, texts: Path, method: str, prune: str = "magnitude(0.5)", **more: Any) -> RunConfig:
    model = {"name": str(encoder), "prune": prune}
    return configuration(encoder, texts, model=model, rounds=2, **OWN[method], **more)


def matrices(folder: Path) -> dict[str, Tensor]:
    """Those of the layers and the table of tokens of a saved model, which plain transformers loads."""
    weights = AutoModel.from_pretrained(folder).state_dict()
    inside = {n: w for n, w in weights.items() if ".layer." in n and w.dim() == 2}
    return inside | {n: w for n, w in weights.items() if "word_embeddings" in n}


def test_the_mask_of_magnitudes_is_torchs_own() -> None:
    linear = torch.nn.Linear(10, 7)
    ours = mask(linear.weight.detach(), pruning("magnitude(0.3)"))
    assert torch.equal(ours, l1_unstructured(linear, "weight", amount=0.3).weight_mask.bool())


@pytest.mark.parametrize("text", ["magnitude(1.0)", "magnitude", "4:2", "2:2", "wanda(0.5)", ""])
def test_what_is_no_pruning_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"model\.prune"):
        RunConfig.model_validate({"model": {"prune": text}})


@pytest.mark.slow
@pytest.mark.parametrize("method", OWN)
def test_zeros_stay_through_all_rounds_and_never_travel(
    method: str, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    free = run(masked(tiny_encoder, tiny_texts, method, "none"), tmp_path / "dense")
    told = run(masked(tiny_encoder, tiny_texts, method), tmp_path / "run")
    frozen = method == "fedkd"  # its embeddings are not trained, and keep what they have
    base, found = matrices(tiny_encoder), matrices(tmp_path / "run" / "model")
    for name, weights in found.items():
        zeros = int((weights == 0).sum())
        if frozen and "word_embeddings" in name:
            assert torch.equal(weights, base[name])
            continue
        assert zeros == round(weights.numel() / 2), name
    assert any(
        not torch.equal(w, base[n] * (w != 0)) for n, w in matrices(tmp_path / "run" / "model").items()
    )
    left = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert left is not None
    assert all(t.dim() == 1 for n, t in left.groups["tensors"].items() if n.endswith(".original"))
    matrix = sum(
        w.numel() for n, w in matrices(tmp_path / "run" / "model").items() if not frozen or "layer" in n
    )
    answers = 2 * 3
    assert free["bytes"]["up"] - told["bytes"]["up"] == pytest.approx(answers * 4 * matrix / 2, rel=0.05)
    assert told["bytes"]["reference_total"] == free["bytes"]["reference_total"]


@pytest.mark.slow
def test_a_run_that_was_cut_short_goes_on_with_the_same_bits(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = masked(tiny_encoder, tiny_texts, "fedavg", "2:4")
    whole = run(config, tmp_path / "whole")
    cut(config, tmp_path / "run", 1)
    assert run(config, tmp_path / "run")["state_sha256"] == whole["state_sha256"]
    for name, weights in matrices(tmp_path / "run" / "model").items():
        left = (weights.reshape(len(weights), -1, 4) != 0).sum(-1)
        assert (left[1:] == 2).all(), name  # row 0 of the table is padding's, and zero


@pytest.mark.slow
def test_the_zeros_of_a_base_can_be_kept(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    run(masked(tiny_encoder, tiny_texts, "fedavg"), tmp_path / "first")
    base = tmp_path / "first" / "model"
    with pytest.raises(ModelError, match="no matrix of"):
        run(masked(tiny_encoder, tiny_texts, "fedavg", "zeros"), tmp_path / "none")
    run(masked(base, tiny_texts, "fedavg", "zeros"), tmp_path / "run")
    before, after = matrices(base), matrices(tmp_path / "run" / "model")
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_has_nothing_to_mask(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    model = {"name": str(tiny_encoder), "prune": "2:4"}
    with pytest.raises(ModelError, match=r'take method = "fedavg"'):
        run(configuration(tiny_encoder, tiny_texts, model=model, method="lora"), tmp_path / "run")
