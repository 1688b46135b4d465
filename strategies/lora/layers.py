"""What rules do to the layers of peft and to their factors, when an adapter is attached or begins anew."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fedllm.config import RunConfig
from fedllm.randomness import stream
from strategies.lora.factors import Factors

__all__ = ["ADAPTER", "carry_base", "fresh", "takes_from_base"]

ADAPTER = "default"
"""The name peft gives an adapter that is given none."""


def takes_from_base(config: RunConfig) -> bool:
    """Whether the adapter starts from a part of the weights, which its initialisation takes out of them."""
    start = str(config.tuning.options.get("init_lora_weights"))
    plain = not (config.tuning.peft == "dora" or config.tuning.options.get("use_dora"))
    return plain and config.model.quantize == "none" and (start == "olora" or start.startswith("pissa"))


def carry_base(layer: Any, base: Factors) -> None:
    """Let a peft layer add s base_B base_A x to its output, as if its frozen weight had changed."""
    device = layer.lora_A[ADAPTER].weight.device
    layer.register_buffer("base_A", base.a.float().to(device), persistent=False)
    layer.register_buffer("base_B", base.b.float().to(device), persistent=False)

    def add(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.linear(inputs[0].to(module.base_A.dtype), module.base_A)
        change = nn.functional.linear(inner, module.base_B)
        return output.add(change.to(output.dtype), alpha=module.scaling[ADAPTER])

    layer.register_forward_hook(add)


def fresh(like: torch.Tensor, seed: int, layer: str, version: int) -> torch.Tensor:
    """Draw A anew as LoRA initialises it: uniform in +-1/sqrt(n)."""
    bound = 1.0 / math.sqrt(like.shape[1])
    values = stream(seed, "fresh-A", layer, version).uniform(-bound, bound, tuple(like.shape))
    return torch.from_numpy(values).to(like.dtype)
