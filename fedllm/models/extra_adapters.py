"""What peft lacks: BitFit (biases), bottleneck adapters, training the head alone, and what plug-ins add.

All but the head add a module behind some modules of a frozen transformers model and change their output y:

    bitfit       y + b                          b starts at 0           (Ben Zaken et al., ACL 2022)
    bottleneck   y + U gelu(D y + d) + u        U and u start at 0      (Houlsby et al., ICML 2019)

``bitfit`` goes behind every module that has a bias, or behind every linear layer of a model without any
(Llama); ``bottleneck`` behind the last linear layer of each transformer layer, where Pfeiffer et al. (EACL
2021) put it. ``head`` adds nothing: only the classification head is trained. A plug-in's kind is a subclass
of :class:`Adapter` as well.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedllm import plugins
from fedllm.errors import ConfigError, ModelError

__all__ = ["NAMES", "Adapter", "Bias", "Bottleneck", "attach", "kinds", "load", "places", "save"]

NAMES = ("bitfit", "bottleneck", "head")
"""The kinds that are fedllm's own."""

_WEIGHTS, _DESCRIPTION = "adapter_model.safetensors", "adapter_config.json"
_SLOT = "small_adapter"


class Adapter(nn.Module):
    """A kind of adapter: a module behind a module of the frozen base.

    Its float32 parameters are trained. They, and nothing else, travel: buffers, and parameters that ask for
    no gradient, must follow from ``width``, ``rank`` and torch's generator, which every node seeds alike.

    Attributes:
        name: what ``tuning.peft`` calls it: lower case, digits and hyphens.
        behind: where it goes unless ``tuning.targets`` says: the last linear layer of each transformer layer,
            every linear layer within one, or every module with a bias (every linear layer if there is none).

    Args:
        width: of the output that it changes.
        rank: ``tuning.rank``.
    """

    name: ClassVar[str]
    behind: ClassVar[Literal["layers", "linear", "biases"]] = "layers"

    @abstractmethod
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of ``y`` [..., width], in the same shape.

        ``y`` is float32 or, on a base of another precision, bfloat16; what is returned is cast to its dtype.
        """


class Bias(Adapter):
    """Add a trained vector to [..., width]."""

    name = "bitfit"
    behind = "biases"

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank)
        # "default" as peft names what it adds, by which adapters are told from the base.
        self.default = nn.Parameter(torch.zeros(width))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Keep the dtype of ``y``."""
        return y + self.default.to(y.dtype)


class Bottleneck(Adapter):
    """Add what two small linear layers with a GELU between them make of [..., width]."""

    name = "bottleneck"

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank)
        down, up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.default = nn.Sequential(OrderedDict(down=down, gelu=nn.GELU(), up=up))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Work in float32 and keep the dtype of ``y``."""
        change: torch.Tensor = self.default(y.float())
        return y + change.to(y.dtype)


def kinds() -> dict[str, type[Adapter]]:
    """Return every kind that is a module behind others, by name: fedllm's own and those of plug-ins.

    Raises:
        ConfigError: a plug-in's kind is none, or takes a name that is taken.
    """
    own: dict[str, type[Adapter]] = {kind.name: kind for kind in (Bias, Bottleneck)}
    added = plugins.adapters()
    for name, kind in added.items():
        if not (isinstance(kind, type) and issubclass(kind, Adapter)):
            raise ConfigError(f"a plug-in adds a kind of adapter {name!r} that is no subclass of Adapter")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ConfigError(
                f"a plug-in adds a kind of adapter {name!r}; its name must be lower case, digits and hyphens"
            )
        if name in NAMES:
            raise ConfigError(f"a plug-in adds a kind of adapter {name!r}, which is fedllm's own; rename it")
    return own | added


def attach(model: Any, name: str, rank: int, targets: Sequence[str], heads: Sequence[str] = ()) -> Any:
    """Freeze a transformers model and put adapters behind some of its modules, in place.

    Args:
        model: without an adapter.
        name: ``head``, or one of :func:`kinds`.
        rank: handed to the adapters: the width of a bottleneck, unused by ``bitfit``.
        targets: ends of module names, or ``all-linear``; empty takes the method's own choice.
        heads: modules that are new in this model, trained and saved whole.

    Returns:
        The model.

    Raises:
        ModelError: there is nothing to put an adapter behind, or it trains nothing.
    """
    model.requires_grad_(False)
    chosen = places(model, name, targets, heads)
    for place in chosen:
        module = model.get_submodule(place)
        module.add_module(_SLOT, _made(kinds()[name], _width(module), rank))
        module.register_forward_hook(_adapted)
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    model.small_adapter = {"name": name, "rank": rank, "places": chosen, "heads": sorted(heads)}
    if name not in NAMES:
        kind = kinds()[name]
        model.small_adapter["class"] = f"{kind.__module__}.{kind.__qualname__}"
    return model


def places(model: nn.Module, name: str, targets: Sequence[str] = (), heads: Sequence[str] = ()) -> list[str]:
    """Return the full names of the modules that get an adapter, sorted."""
    if name == "head":
        return []
    wide = {n: m for n, m in model.named_modules() if n not in heads and _width(m)}
    linear = [(layer, n) for layer, n in _by_layer(wide) if _is_linear(wide[n])]
    everywhere = [n for _, n in linear]
    if tuple(targets) == ("all-linear",):
        chosen = everywhere
    elif targets:
        chosen = [n for n in wide if any(n == t or n.endswith(f".{t}") for t in targets)]
    elif (behind := kinds()[name].behind) == "layers":
        chosen = list(dict(linear).values())
    elif behind == "linear":
        chosen = everywhere
    else:
        chosen = [n for n, m in wide.items() if getattr(m, "bias", None) is not None] or everywhere
    if not chosen:
        raise ModelError(
            f'tuning.peft = "{name}" finds nothing in {type(model).__name__} to put an adapter behind; '
            "name modules with tuning.targets"
        )
    return sorted(chosen)


def save(model: Any, folder: Path) -> None:
    """Write what is not of the base, and what :func:`load` needs to know."""
    save_file({n: t.detach().cpu().contiguous() for n, t in _added(model).items()}, folder / _WEIGHTS)
    (folder / _DESCRIPTION).write_text(json.dumps(model.small_adapter, indent=2) + "\n", encoding="utf-8")


def load(model: Any, folder: Path) -> Any:
    """Put an adapter that :func:`save` wrote on the plain base model, in place, and return it.

    Raises:
        ModelError: the folder holds no such adapter, one of another model, or one of a plug-in that is not
            loaded.
    """
    try:
        description = json.loads((folder / _DESCRIPTION).read_bytes())
        made = [description[key] for key in ("name", "rank", "places", "heads")]
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} holds no adapter of {' or '.join(NAMES)}: {error}") from error
    if made[0] != "head" and made[0] not in kinds():
        raise ModelError(
            f"the adapter in {folder} is of the kind {made[0]!r}, which a plug-in adds "
            f"({description.get('class')}): load that first, with fedllm.plugins.load"
        )
    try:
        attach(model, *made)
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    except (AttributeError, RuntimeError) as error:
        raise ModelError(f"the adapter in {folder} was made for another model: {error}") from error
    if unknown:
        raise ModelError(f"the adapter in {folder} was made for another model: {unknown[0]} is unknown here")
    if lacking := sorted(_added(model).keys() - tensors.keys()):
        raise ModelError(f"the adapter in {folder} was made for another model: it lacks {lacking[0]}")
    return model


def _made(kind: type[Adapter], width: int, rank: int) -> Adapter:
    adapter = kind(width, rank)
    if not any(parameter.requires_grad for parameter in adapter.parameters()):
        raise ModelError(f'tuning.peft = "{kind.name}": {kind.__name__} has no parameter to train')
    return adapter


def _added(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what is trained, and all of every adapter, by name."""
    trained: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return trained | {n: t for n, t in model.state_dict().items() if f".{_SLOT}." in n}


def _adapted(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    adapter = getattr(module, _SLOT)
    changed: torch.Tensor = adapter(output)
    if changed.shape != output.shape:
        raise ModelError(
            f'tuning.peft = "{adapter.name}" makes {list(changed.shape)} of {list(output.shape)}; '
            "an adapter must keep the shape"
        )
    return changed.to(output.dtype)


def _width(module: nn.Module) -> int:
    """Width of a linear or normalising module's output; 0 for others."""
    if isinstance(module, nn.Embedding):
        return 0
    for size in (getattr(module, "out_features", None), getattr(module, "nf", None)):
        if isinstance(size, int):
            return size
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) and weight.dim() == 1 else 0


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "out_features") or hasattr(module, "nf")


def _by_layer(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (layer, module) for modules inside a numbered layer, in the model's order."""
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            yield ".".join(parts[: number + 1]), name
