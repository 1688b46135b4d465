"""The sections of the model: which one it is, and which of its parameters are trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fedllm.section import Section


class ModelConfig(Section):
    """The base model."""

    name: str = "minilm"
    """Bundled short name (``minilm``, ``smollm2``), hub name, local folder or GGUF file."""
    task: str = "classification"
    """What the model is asked to do: ``classification``, ``causal``, or one that a plug-in adds."""
    pooling: Literal["mean", "cls", "last", "own"] = "mean"
    """How an encoder's tokens become one vector; ``own`` takes the model's own classification head."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Precision of the frozen part; trained tensors stay float32. ``auto``, settled as a run is started, is
    ``bfloat16`` where this machine computes it natively and clients train by gradient."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the frozen part's matrices in eight or four bits (QLoRA), through bitsandbytes."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout probability everywhere in the base model while training."""


class TuningConfig(Section):
    """Which parameters are trained."""

    peft: str = "lora"
    """A peft method by name (``lora``, ``dora``, ``ia3``, ``vera``, ``prompt``, ...) or ``full``."""
    rank: int = Field(default=8, ge=1)
    """Rank of LoRA-like adapters."""
    alpha: float = Field(default=16.0, gt=0.0)
    """LoRA scale: updates are multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Module names that carry adapters; empty takes peft's own choice for the architecture."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the peft method, by peft's own names."""
