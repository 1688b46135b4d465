"""The sections of the model: which one it is, and which of its parameters are trained."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from fedllm.section import Section


class Pruning(NamedTuple):
    """What ``model.prune`` says.

    Attributes:
        kind: ``none``, ``magnitude``, ``groups`` (n of m), or ``zeros``.
        share: of a matrix's weights that ``magnitude`` sets to zero.
        of: (n, m) of ``groups``.
    """

    kind: Literal["none", "magnitude", "groups", "zeros"]
    share: float = 0.0
    of: tuple[int, int] = (0, 0)


def pruning(text: str) -> Pruning:
    """Read ``model.prune``.

    Raises:
        ValueError: it is none of them.

    >>> pruning("magnitude(0.5)"), pruning("2:4").of
    (Pruning(kind='magnitude', share=0.5, of=(0, 0)), (2, 4))
    """
    if text == "none":
        return Pruning("none")
    if text == "zeros":
        return Pruning("zeros")
    if found := re.fullmatch(r"magnitude\((0?\.[0-9]+)\)", text):
        return Pruning("magnitude", float(found[1]))
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if found and 0 < int(found[1]) < int(found[2]):
        return Pruning("groups", of=(int(found[1]), int(found[2])))
    raise ValueError(
        f'model.prune = {text!r} is none of "none", "magnitude(0.5)" (the share that becomes zero), '
        '"2:4" (two of four neighbours stay) and "zeros" (those of the base)'
    )


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
    prune: str = "none"
    """Weights of trained matrices that are set to zero, stay zero and never travel: ``magnitude(0.5)`` (the
    smallest half of each), ``2:4`` (two of four neighbours stay), or ``zeros`` (those that the base has);
    for a model that is tuned whole, or FedKD's student."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout probability everywhere in the base model while training."""

    @field_validator("prune")
    @classmethod
    def _prune(cls, value: str) -> str:
        pruning(value)
        return value


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
    start: Literal["usual", "residual"] = "usual"
    """What LoRA on a quantised base begins as: ``usual``, nothing, or ``residual``, the best of its rank that
    makes up for what quantising took away."""
    blocks: int = Field(default=1, ge=1, le=255)
    """Groups of layers that take turns, one a round, which alone is trained and sent (HiFT); 1 trains all."""
    block_order: Literal["up", "down", "random"] = "up"
    """Whose turn is first: the lowest group's, the highest's, or drawn anew each time all have had theirs."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the peft method, by peft's own names."""
