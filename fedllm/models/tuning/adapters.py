"""From ``[tuning]`` to an adapter: peft's methods by name, rank, targets and options, and our own."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.models import extra_adapters
from fedllm.models.tuning.kinds import plain
from fedllm.models.tuning.peft_options import check_options, refuse_ignored
from fedllm.wording import suggest

__all__ = ["attach", "method_names", "reads"]

# peft's names carry a suffix that nobody writes, and two common methods are switches of lora there.
_ALIASES = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
_SWITCHES = {"dora": "use_dora", "rslora": "use_rslora"}
_PREFIXES = {"PREFIX_TUNING", "CARTRIDGE"}
# These choose among tasks or trained adapters, of which a run has one.
_UNSUITED = {"MULTITASK_PROMPT_TUNING", "POLY", "XLORA"}
_CHOICES = {"target_modules", "target_parameters"}
_QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("qkv_proj",),
    ("Wqkv",),
    ("query_key_value",),
    ("in_proj", "x_proj"),
)
"""What architectures call the projections that LoRA adapts (Hu et al., ICLR 2022), or have instead."""


def method_names() -> list[str]:
    """Return every accepted ``tuning.peft`` apart from ``full``, those of plug-ins included.

    >>> {"lora", "dora", "vera", "ia3", "adalora", "prompt", "bitfit", "head"} <= set(method_names())
    True
    """
    of_peft = [kind.lower().replace("_", "-") for kind in _kinds()]
    return sorted({*of_peft, *_ALIASES, *_SWITCHES, *_small()})


def reads(name: str) -> frozenset[str]:
    """Return the keys of ``[tuning]`` that a method reads, from what peft itself says of it.

    Args:
        name: as ``tuning.peft`` takes it.

    Raises:
        ConfigError: a plug-in's kind is none, or takes a name that is taken.
        ModelError: there is no such method.

    >>> sorted(reads("ia3")), sorted(reads("lora"))
    (['options', 'targets'], ['alpha', 'options', 'rank', 'targets'])
    """
    if plain(name) == "full":
        return frozenset()
    read = {"options", "targets"}
    if plain(name) in _small():
        return frozenset(read if plain(name) in ("head", "bitfit") else read | {"rank"})
    fields = set(_fields(_config_class(name)))
    read |= {"rank"} if fields & {"r", "init_r"} and "oft_block_size" not in fields else set()
    return frozenset(read | ({"alpha"} if fields & {"lora_alpha", "alpha"} else set()))


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
    if plain(config.tuning.peft) in _small():
        return _attach_small(model, config, heads)
    settings = _settings(model, config, task, heads)
    if config.training.recomputes and settings.peft_type in _PREFIXES:
        raise ModelError(
            f"{config.training.recomputing} computes layers again without the prefixes that "
            f'tuning.peft = {config.tuning.peft!r} gave them; take training.memory = "plain"'
        )
    try:
        with warnings.catch_warnings(record=True) as said:
            # Most of it is about peft's own deprecated calls, and defaults that the options may change.
            warnings.simplefilter("always")
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
    refuse_ignored(said, config.tuning.options)
    if "exclude_modules" in _fields(type(settings)) and check_target_module_exists(settings, "pooler.dense"):
        # Our encoders come without the pooler; the adapter must not look for it in a stock model.
        settings.exclude_modules = {*(settings.exclude_modules or ()), "pooler.dense"}
    if settings.is_prompt_learning:
        # peft hands its prefixes over under the name that transformers has begun to replace.
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    if model.dtype != torch.float32:
        _cast_at_borders(adapted, model.dtype, {"classifier", "score", *heads})
    return adapted


def _small() -> set[str]:
    """Return the names of the adapters that are not peft's.

    Raises:
        ConfigError: a plug-in's kind is none, or takes a name that is taken.
    """
    names = {"head", *extra_adapters.kinds()}
    of_peft = {kind.lower().replace("_", "-") for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    if taken := sorted(names & {*of_peft, *_ALIASES, *_SWITCHES, "full"}):
        raise ConfigError(f"a plug-in adds a kind of adapter {taken[0]!r}, which is taken already; rename it")
    return names


def _attach_small(model: Any, config: RunConfig, heads: Sequence[str]) -> Any:
    tuning = config.tuning
    if tuning.options:
        raise ModelError(f"tuning.options.{min(tuning.options)} is unknown to {tuning.peft}, which has none")
    if plain(tuning.peft) == "head" and (tuning.targets or not tasks.of(config).headed):
        wrong = f'model.task = "{config.model.task}" has none; take "classification", for one'
        wrong = "leave tuning.targets empty" if tuning.targets else wrong
        raise ModelError(f'tuning.peft = "head" trains the head on the base model alone: {wrong}')
    if tuning.targets:
        _targets(model, tuning.targets)
    adapted = extra_adapters.attach(model, plain(tuning.peft), tuning.rank, tuning.targets, heads)
    if model.dtype != torch.float32:
        for head in heads:
            model.get_submodule(head).register_forward_pre_hook(_widen)
    return adapted


def _settings(model: Any, config: RunConfig, task: str, heads: Sequence[str]) -> Any:
    tuning = config.tuning
    kind = _config_class(tuning.peft)
    fields = _fields(kind)
    values: dict[str, Any] = {"task_type": task}
    if switch := _SWITCHES.get(plain(tuning.peft)):
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
    elif not _CHOICES & tuning.options.keys() and (usual := _usual_targets(model, kind)):
        values["target_modules"] = usual
    for name in tuning.options:
        if name not in fields:
            raise ModelError(f"tuning.options.{name} is unknown to {kind.__name__}{suggest(name, fields)}")
    check_options(_name_of(kind), tuning.options, values, model)
    options = dict(tuning.options)
    if "modules_to_save" in fields and (heads or options.get("modules_to_save")):
        values["modules_to_save"] = sorted({*heads, *(options.pop("modules_to_save", None) or ())})
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            settings = kind(**(values | options))
    except ImportError as error:
        raise ModelError(f"tuning.peft = {tuning.peft!r} cannot be used here: {_one_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise ModelError(f"tuning.options are not what {kind.__name__} takes: {error}") from error
    refuse_ignored(said, tuning.options)
    if isinstance(settings, peft.TrainableTokensConfig) and not settings.token_indices:
        raise ModelError(
            "tuning.options.token_indices must list the numbers of the tokens to train, such as [5, 6]"
        )
    return settings


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
    kind = plain(name)
    wanted = "LORA" if kind in _SWITCHES else _ALIASES.get(kind, kind.upper().replace("-", "_"))
    if wanted in _kinds():
        return _kinds()[wanted]
    raise ModelError(f"tuning.peft = {name!r} is unknown{suggest(kind, ['full', *method_names()])}")


def _name_of(kind: type[peft.PeftConfig]) -> str:
    return next(name for name, settings in _kinds().items() if settings is kind)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _fields(kind: type[peft.PeftConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]


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


def _usual_targets(model: Any, kind: type[peft.PeftConfig]) -> list[str] | None:
    """Return peft's own choice for an architecture, or else its projections of queries and values.

    The latter only for methods that peft itself puts there, as a Llama shows. ``None`` where a method has
    another way to choose, or none. Said outright, peft's choice also works on mixtures of experts.
    """
    name = next(name for name, settings in PEFT_TYPE_TO_CONFIG_MAPPING.items() if settings is kind)
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(name)
    chosen = getattr(tuner, "target_module_mapping", {})
    if known := chosen.get(model.config.model_type):
        return list(known)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    usual = _QUERY_AND_VALUE if chosen.get("llama") == ["q_proj", "v_proj"] else ()
    return next((list(pair) for pair in usual if names.issuperset(pair)), None)


def _own_modules(model: nn.Module) -> str:
    """List the last parts of the names of modules that hold parameters, as targets name them."""
    holders = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    shorts = sorted({name.rpartition(".")[2] for name in holders if name and not name[-1].isdigit()})
    return f"; its modules are {', '.join(shorts)}"
