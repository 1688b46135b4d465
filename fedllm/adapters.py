"""From ``[tuning]`` to an adapter: peft's methods by name, rank, targets and options, and our own."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn

from fedllm import small_adapters
from fedllm.config import RunConfig
from fedllm.errors import ModelError

__all__ = ["attach", "method_names"]

# peft's names carry a suffix that nobody writes, and two common methods are switches of lora there.
_ALIASES = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
_SWITCHES = {"dora": "use_dora", "rslora": "use_rslora"}
# These choose among tasks or trained adapters, of which a run has one.
_UNSUITED = {"MULTITASK_PROMPT_TUNING", "POLY", "XLORA"}


def method_names() -> list[str]:
    """Return every accepted ``tuning.peft`` apart from ``full``.

    >>> {"lora", "dora", "vera", "ia3", "adalora", "prompt", "bitfit", "head"} <= set(method_names())
    True
    """
    of_peft = [kind.lower().replace("_", "-") for kind in _kinds()]
    return sorted({*of_peft, *_ALIASES, *_SWITCHES, *small_adapters.NAMES})


def attach(model: Any, config: RunConfig, task: str, heads: Sequence[str] = ()) -> Any:
    """Wrap ``model`` in a freshly initialised adapter.

    Args:
        model: a transformers model.
        config: the run; ``config.tuning`` names the method, and schedules of some methods need its length.
        task: peft's task type, e.g. ``FEATURE_EXTRACTION``.
        heads: modules that are new in this model and must be trained and saved whole.

    Raises:
        ModelError: unknown method (names the nearest), unknown option, unknown target (lists the model's
            own), or a method that does not work for this model.
    """
    if _plain(config.tuning.peft) in small_adapters.NAMES:
        return _attach_small(model, config, heads)
    settings = _settings(model, config, task, heads)
    try:
        with warnings.catch_warnings():
            # peft remarks on its own deprecated calls, and on defaults that the options may change.
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, settings)
    except (
        AssertionError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ImportError,
        RuntimeError,
    ) as error:
        hint = _own_modules(model) if "target_modules" in _fields(type(settings)) else ""
        raise ModelError(
            f"tuning.peft = {config.tuning.peft!r} cannot be attached to {type(model).__name__}: "
            f"{_one_line(error)}{hint}"
        ) from error
    if "exclude_modules" in _fields(type(settings)) and check_target_module_exists(settings, "pooler.dense"):
        # Our encoders come without the pooler; the adapter must not look for it in a stock model.
        settings.exclude_modules = {*(settings.exclude_modules or ()), "pooler.dense"}
    if settings.is_prompt_learning:
        # peft hands its prefixes over under the name that transformers has begun to replace.
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    if model.dtype != torch.float32:
        _cast_at_borders(adapted, model.dtype, {"classifier", "score", *heads})
    return adapted


def _attach_small(model: Any, config: RunConfig, heads: Sequence[str]) -> Any:
    tuning = config.tuning
    if tuning.options:
        raise ModelError(f"tuning.options.{min(tuning.options)} is unknown to {tuning.peft}, which has none")
    if _plain(tuning.peft) == "head" and (tuning.targets or config.model.task == "causal"):
        wrong = "leave tuning.targets empty" if tuning.targets else 'model.task must be "classification"'
        raise ModelError(f'tuning.peft = "head" trains the classification head alone: {wrong}')
    if tuning.targets:
        _targets(model, tuning.targets)
    adapted = small_adapters.attach(model, _plain(tuning.peft), tuning.rank, tuning.targets, heads)
    if model.dtype != torch.float32:
        for head in heads:
            model.get_submodule(head).register_forward_pre_hook(_widen)
    return adapted


def _settings(model: Any, config: RunConfig, task: str, heads: Sequence[str]) -> Any:
    tuning = config.tuning
    kind = _config_class(tuning.peft)
    fields = _fields(kind)
    values: dict[str, Any] = {"task_type": task}
    if switch := _SWITCHES.get(_plain(tuning.peft)):
        values[switch] = True
    for name, value in {"r": tuning.rank, "lora_alpha": tuning.alpha, "alpha": tuning.alpha}.items():
        if name in fields:
            values[name] = value
    if "oft_block_size" in fields:
        # OFT takes a block size or a number of blocks, never both; peft's default is the size.
        del values["r"]
    if "total_step" in fields:
        # AdaLoRA prunes from init_r down to target_r by its own calls between steps, which a federated
        # round does not make: the rank stays where it starts.
        values |= {"init_r": tuning.rank, "target_r": tuning.rank}
        values["total_step"] = config.rounds * config.training.local_steps
        del values["r"]
    if "num_virtual_tokens" in fields:
        values["num_virtual_tokens"] = 20
    if tuning.targets:
        if "target_modules" not in fields:
            raise ModelError(
                f"tuning.targets does not apply to tuning.peft = {tuning.peft!r}; leave it empty"
            )
        values["target_modules"] = _targets(model, tuning.targets)
    if heads and "modules_to_save" in fields:
        values["modules_to_save"] = sorted(heads)
    for name in tuning.options:
        if name not in fields:
            raise ModelError(f"tuning.options.{name} is unknown to {kind.__name__}{_nearest(name, fields)}")
    try:
        return kind(**(values | tuning.options))
    except (ValueError, TypeError) as error:
        raise ModelError(f"tuning.options are not what {kind.__name__} takes: {error}") from error


def _kinds() -> dict[str, type[peft.PeftConfig]]:
    kinds = {str(kind.value): settings for kind, settings in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {kind: settings for kind, settings in kinds.items() if kind not in _UNSUITED}


def _cast_at_borders(adapted: nn.Module, dtype: torch.dtype, heads: set[str]) -> None:
    """Let modules that are trained whole, in float32, work inside a frozen part of another precision.

    Adapter layers of peft cast for themselves; copies of whole modules do not. A head's float32 stays.
    """
    for name, module in adapted.named_modules():
        if isinstance(module, ModulesToSaveWrapper | LNTuningLayer):
            module.register_forward_pre_hook(_widen)
            if not any(name.endswith(f".{head}") for head in heads):
                module.register_forward_hook(partial(_narrow, dtype))


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _narrow(
    dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
) -> torch.Tensor:
    return output.to(dtype)


def _config_class(name: str) -> type[peft.PeftConfig]:
    plain = _plain(name)
    wanted = "LORA" if plain in _SWITCHES else _ALIASES.get(plain, plain.upper().replace("-", "_"))
    if wanted in _kinds():
        return _kinds()[wanted]
    raise ModelError(f"tuning.peft = {name!r} is unknown{_nearest(plain, ['full', *method_names()])}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _fields(kind: type[peft.PeftConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]


def _nearest(given: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid are {', '.join(names)}"


def _targets(model: nn.Module, targets: Sequence[str]) -> str | list[str]:
    if tuple(targets) == ("all-linear",):
        return "all-linear"
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ModelError(
                f"tuning.targets: {type(model).__name__} has no module {target!r}{_own_modules(model)}"
            )
    return list(targets)


def _own_modules(model: nn.Module) -> str:
    """List the last parts of the names of modules that hold parameters, as targets name them."""
    holders = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    shorts = sorted({name.rpartition(".")[2] for name in holders if name and not name[-1].isdigit()})
    return f"; its modules are {', '.join(shorts)}"
