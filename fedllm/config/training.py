"""The section of what a client does in a round."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedllm.section import Section


class TrainingConfig(Section):
    """What a client does with its data in one round."""

    local_steps: int = Field(default=8, ge=1)
    """Optimiser steps per round."""
    batch_size: int = Field(default=16, ge=1)
    """Texts per step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimiser; its moments start anew every round."""
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """Local learning rate at the first round."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the local learning rate falls from the first round to the last."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=0.0, ge=0.0)
    """Gradient norm above which a step is scaled down; 0 leaves gradients alone."""
    proximal: float = Field(default=0.0, ge=0.0)
    """FedProx coefficient mu: adds mu/2 ||w - w_round||^2 to the loss."""
    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"
    """Weight of each class's texts in the loss, in the order of the classes; ``balanced``: rare ones more."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each text's label that is spread evenly over all classes."""
    beta: float = Field(default=0.1, gt=0.0)
    """How dearly a model that learns preferences pays for leaving its base (DPO's beta)."""
    memory: Literal["plain", "checkpoint", "lean"] = "plain"
    """What is kept for the backward pass: everything; each layer's input, the rest being computed again
    (``checkpoint``); or that, with a language model's logits made for a few tokens at a time (``lean``)."""
    gradient_checkpointing: bool = False
    """The same as ``memory = "checkpoint"``."""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights(cls, given: Any) -> Any:
        numbers = given if isinstance(given, list | tuple) else ()
        good = all(isinstance(one, int | float) and 0 < one < math.inf for one in numbers)
        if given not in ("none", "balanced") and not (numbers and good):
            raise ValueError(f'{given!r} is not "none", "balanced" or a list of numbers above 0')
        return given

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if self.gradient_checkpointing and self.memory == "lean":
            raise ValueError('gradient_checkpointing = true contradicts memory = "lean"; leave it out')
        return self

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes layers again.

        >>> TrainingConfig(memory="lean").recomputes, TrainingConfig().recomputes
        (True, False)
        """
        return self.gradient_checkpointing or self.memory != "plain"

    @property
    def recomputing(self) -> str:
        """What asks for it, as sentences name it.

        >>> TrainingConfig(gradient_checkpointing=True).recomputing
        'training.gradient_checkpointing = true'
        """
        if self.memory == "plain":
            return "training.gradient_checkpointing = true"
        return f'training.memory = "{self.memory}"'
