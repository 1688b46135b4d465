"""Options of peft that would be taken and then not do what they say: refused, each with its reason.

peft reads some options only in its own training loop, on one kind of base, or after a look at data that a
federated run does not take. What it notices itself it puts into a warning; what it does not is listed here. A
test walks through every option of every method and finds those that change nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fedllm.errors import ModelError

__all__ = ["check_options", "refuse_ignored"]

_OWN = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
"""What a run knows for itself."""

_FROM_TUNING = {
    "r": "tuning.rank",
    "lora_alpha": "tuning.alpha",
    "alpha": "tuning.alpha",
    "target_modules": "tuning.targets",
}

_ADALORA = {
    "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_dropout",
    "modules_to_save", "target_modules",
}  # fmt: skip
"""AdaLoRA inherits LoRA's options but not what they do, and prunes ranks only when its own loop asks."""

_NEEDS_DATA = "is computed from data before training begins, which a federated run does not do"
_GPTQ = "works on GPTQ bases alone, and a run has none"
_OWN_LOSS = "belongs to a loss of peft's own, which a run does not use"
_MEGATRON = "is for models of Megatron, and a run has none"
_IDLE = {
    "LORA": {
        "use_qalora": _GPTQ,
        "qalora_group_size": _GPTQ,
        "eva_config": _NEEDS_DATA,
        "corda_config": _NEEDS_DATA,
        "lora_ga_config": _NEEDS_DATA,
        "megatron_config": _MEGATRON,
        "megatron_core": _MEGATRON,
    },
    "CPT": dict.fromkeys(
        (
            "opt_weighted_loss_type",
            "opt_loss_decay_factor",
            "opt_projection_epsilon",
            "opt_projection_format_epsilon",
        ),
        _OWN_LOSS,
    ),
    "SHADOW": {"auxiliary_loss_weight": _OWN_LOSS},
    "P_TUNING": {"encoder_dropout": "works in an LSTM encoder alone, and the default is an MLP"},
}
_STARTS_FROM_DATA = ("eva", "corda", "lora_ga")
_IGNORED = re.compile(r"ignor|not used|only used|no effect|only supported|[Ss]etting ")


def check_options(kind: str, options: Mapping[str, Any], decided: Iterable[str], model: nn.Module) -> None:
    """Refuse options that would be without effect.

    Args:
        kind: peft's name of the method, such as ``LORA``.
        options: what the user set.
        decided: fields that ``[tuning]`` decides.
        model: the plain model, by whose modules patterns are checked.

    Raises:
        ModelError: names the option and says why.
    """
    for name, value in options.items():
        reason = _IDLE.get(kind, {}).get(name)
        if name == "encoder_dropout" and options.get("encoder_reparameterization_type") == "LSTM":
            reason = None
        if name in _OWN:
            reason = "is known to the run itself; leave it out"
        elif name in _FROM_TUNING and name in decided:
            reason = f"is what {_FROM_TUNING[name]} sets; give that"
        elif kind == "ADALORA" and name not in _ADALORA:
            reason = "is idle here: a federated round prunes no ranks, and AdaLoRA does nothing else with it"
        elif name == "init_lora_weights" and value in _STARTS_FROM_DATA:
            reason = f'= "{value}" {_NEEDS_DATA}'
        elif name in ("rank_pattern", "alpha_pattern"):
            reason = _unmatched(value, model)
        if reason:
            raise ModelError(f"tuning.options.{name} {reason}")


def _unmatched(patterns: Any, model: nn.Module) -> str | None:
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns or ():
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names):
            return f"has {pattern!r}, which no module of {type(model).__name__} fits"
    return None


def refuse_ignored(said: Sequence[warnings.WarningMessage], options: Mapping[str, Any]) -> None:
    """Turn what peft warns of into an error where it sets an option aside.

    Raises:
        ModelError: quotes the warning.
    """
    for warning in said:
        text = " ".join(str(warning.message).split())
        named = [name for name in options if re.search(rf"\b{name}\b", text)]
        if named and _IGNORED.search(text):
            raise ModelError(f"tuning.options.{named[0]} is set aside by peft: {text[:300]}")
