"""A base in eight or four bits: smaller, frozen, and still a base that an adapter learns on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from fedllm.config import DataConfig, ModelConfig, RunConfig, TuningConfig
from fedllm.data.tokens import Batch
from fedllm.errors import ModelError
from fedllm.models.model import Model, load

pytestmark = pytest.mark.slow

Quantize = Literal["none", "int8", "nf4"]


def loaded(quantize: Quantize) -> Model:
    config = RunConfig(
        model=ModelConfig(quantize=quantize), tuning=TuningConfig(targets=("query", "value"), rank=4)
    )
    return load(config, ("a", "b"))


def matrix_bytes(model: Model) -> int:
    frozen = (p for n, p in model.module.named_parameters() if not p.requires_grad and "encoder" in n)
    return sum(p.numel() * p.element_size() for p in frozen)


@pytest.mark.parametrize(("quantize", "smaller"), [("int8", 3.8), ("nf4", 7.0)])
def test_a_quantised_base_is_smaller_and_learns(quantize: Quantize, smaller: float) -> None:
    model = loaded(quantize)
    assert matrix_bytes(loaded("none")) > smaller * matrix_bytes(model)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    batch = Batch(
        torch.arange(1000, 1064).reshape(2, 32), torch.ones(2, 32, dtype=torch.int64), torch.tensor([0, 1])
    )
    parameters = list(model.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.forward(batch).loss
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_whole_model_cannot_be_trained_quantised() -> None:
    config = RunConfig(model=ModelConfig(quantize="nf4"), tuning=TuningConfig(peft="full"))
    with pytest.raises(ModelError, match="freezes the base"):
        load(config, ("a", "b"))


@pytest.mark.parametrize("peft", ["prompt", "prefix", "p-tuning"])
@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_an_evaluation_leaves_a_four_bit_base_trainable(
    tiny_encoder: Path, tiny_causal: Path, monkeypatch: pytest.MonkeyPatch, kind: str, peft: str
) -> None:
    # What a processor with AVX512-BF16 makes of the matrices at the first pass without gradients.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    causal = kind == "causal"
    base = ModelConfig(
        name=str(tiny_causal if causal else tiny_encoder),
        task="causal" if causal else "classification",
        quantize="nf4",
    )
    short = DataConfig(max_length=16)  # virtual tokens take positions too
    model = load(RunConfig(model=base, tuning=TuningConfig(peft=peft, rank=4), data=short), ("a", "b"))
    ids = torch.arange(5, 25).reshape(2, 10)
    batch = Batch(ids, torch.ones_like(ids), ids if causal else torch.tensor([0, 1]))

    def gradients() -> list[torch.Tensor]:
        model.module.zero_grad()
        model.loss(batch).backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for p in model.trainable().values() if p.grad is not None]

    model.module.eval()
    packed = [p.clone() for p in model.module.parameters() if p.dtype == torch.uint8]
    before = gradients()
    with torch.inference_mode():
        model.forward(batch)
    assert packed
    frozen = [p for p in model.module.parameters() if p.dtype == torch.uint8]
    assert all(torch.equal(old, new) for old, new in zip(packed, frozen, strict=True))
    assert len(before) == len(model.trainable())
    assert all(old.any() and torch.equal(old, new) for old, new in zip(before, gradients(), strict=True))
