"""The section of what some clients of a simulation do against the others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedllm.section import Section


class AttackConfig(Section):
    """What some clients of a simulation do against the others, to see what the server makes of it."""

    kind: Literal["none", "sign_flip", "scale", "label_flip", "backdoor", "garbage"] = "none"
    """``sign_flip`` sends the update's opposite, ``scale`` a longer one, ``garbage`` random numbers as long;
    ``label_flip`` trains on the classes in reverse, ``backdoor`` on half of its texts with a trigger and
    ``target`` for their class."""
    share: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the clients that attack, rounded down; the seed draws which."""
    factor: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """How many times as long as an honest one their update is; with ``backdoor`` more than 1 is model
    replacement (Bagdasaryan et al., AISTATS 2020)."""
    trigger: str = Field(default="cf", min_length=1)
    """Text that opens the backdoor, at the beginning of another."""
    target: int = Field(default=0, ge=0)
    """Number of the class that the backdoor leads to."""
