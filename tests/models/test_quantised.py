"""A base in eight or four bits: smaller, frozen, and still a base that an adapter learns on."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from fedllm.config import ModelConfig, RunConfig, TuningConfig
from fedllm.data import Batch
from fedllm.errors import ModelError
from fedllm.models import Model, load

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
