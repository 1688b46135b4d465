"""A frozen base in eight or four bits, through bitsandbytes (QLoRA, Dettmers et al., NeurIPS 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedllm.config import RunConfig
from fedllm.errors import ModelError
from fedllm.extras import require

__all__ = ["keep_layout", "quantization"]


def quantization(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Return what makes ``from_pretrained`` quantise the base as it loads, straight onto ``device``.

    Raises:
        ModelError: the base is to be trained itself.
        ConfigError: bitsandbytes is not installed.
    """
    if config.model.quantize == "none":
        return {}
    if config.tuning.peft == "full":
        raise ModelError(
            f'model.quantize = "{config.model.quantize}" freezes the base, which is to be trained'
        )
    require("bitsandbytes", f'model.quantize = "{config.model.quantize}"')
    from transformers import BitsAndBytesConfig

    four = config.model.quantize == "nf4"
    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, config.model.dtype),
    )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def keep_layout(model: nn.Module) -> None:
    """Keep a 4-bit base as it was loaded.

    At the first pass without gradients bitsandbytes repacks its matrices for a processor's bfloat16 kernel
    that has no derivative: from then on nothing in front of them could be trained, and one evaluation
    more would change a run's numbers.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute
