"""What peft lacks: BitFit (biases), bottleneck adapters, and training the head alone.

The first two add a module behind some modules of a frozen transformers model and change their output y:

    bitfit       y + b                          b starts at 0           (Ben Zaken et al., ACL 2022)
    bottleneck   y + U gelu(D y + d) + u        U and u start at 0      (Houlsby et al., ICML 2019)

``bitfit`` goes behind every module that has a bias, or behind every linear layer of a model without any
(Llama); ``bottleneck`` behind the last linear layer of each transformer layer, where Pfeiffer et al. (EACL
2021) put it. ``head`` adds nothing: only the classification head is trained.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedllm.errors import ModelError

__all__ = ["NAMES", "Bias", "Bottleneck", "attach", "load", "places", "save"]

NAMES = ("bitfit", "bottleneck", "head")

_WEIGHTS, _DESCRIPTION = "adapter_model.safetensors", "adapter_config.json"
_SLOT = "small_adapter"


class Bias(nn.Module):
    """Add a trained vector to [..., width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # "default" as peft names what it adds, by which adapters are told from the base.
        self.default = nn.Parameter(torch.zeros(width))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Keep the dtype of ``y``."""
        return y + self.default.to(y.dtype)


class Bottleneck(nn.Module):
    """Add what two small linear layers with a GELU between them make of [..., width]."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        down, up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.default = nn.Sequential(OrderedDict(down=down, gelu=nn.GELU(), up=up))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Work in float32 and keep the dtype of ``y``."""
        change: torch.Tensor = self.default(y.float())
        return y + change.to(y.dtype)


def attach(model: Any, name: str, rank: int, targets: Sequence[str], heads: Sequence[str] = ()) -> Any:
    """Freeze a transformers model and put adapters behind some of its modules, in place.

    Args:
        model: without an adapter.
        name: one of :data:`NAMES`.
        rank: width of the bottleneck; unused by the others.
        targets: ends of module names, or ``all-linear``; empty takes the method's own choice.
        heads: modules that are new in this model, trained and saved whole.

    Returns:
        The model.

    Raises:
        ModelError: there is nothing to put an adapter behind.
    """
    model.requires_grad_(False)
    chosen = places(model, name, targets, heads)
    for place in chosen:
        module = model.get_submodule(place)
        width = _width(module)
        adapter = Bias(width) if name == "bitfit" else Bottleneck(width, rank)
        module.add_module(_SLOT, adapter)
        module.register_forward_hook(_adapted)
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    model.small_adapter = {"name": name, "rank": rank, "places": chosen, "heads": sorted(heads)}
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
    elif name == "bottleneck":
        chosen = list(dict(linear).values())
    else:
        chosen = [n for n, m in wide.items() if getattr(m, "bias", None) is not None] or everywhere
    if not chosen:
        raise ModelError(
            f'tuning.peft = "{name}" finds nothing in {type(model).__name__} to put an adapter behind; '
            "name modules with tuning.targets"
        )
    return sorted(chosen)


def save(model: Any, folder: Path) -> None:
    """Write the trained tensors and what :func:`load` needs to know."""
    trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / _WEIGHTS)
    (folder / _DESCRIPTION).write_text(json.dumps(model.small_adapter, indent=2) + "\n", encoding="utf-8")


def load(model: Any, folder: Path) -> Any:
    """Put an adapter that :func:`save` wrote on the plain base model, in place, and return it.

    Raises:
        ModelError: the folder holds no such adapter, or one of another model.
    """
    try:
        description = json.loads((folder / _DESCRIPTION).read_bytes())
        made = [description[key] for key in ("name", "rank", "places", "heads")]
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} holds no adapter of {' or '.join(NAMES)}: {error}") from error
    try:
        attach(model, *made)
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
    except (AttributeError, RuntimeError) as error:
        raise ModelError(f"the adapter in {folder} was made for another model: {error}") from error
    if unknown:
        raise ModelError(f"the adapter in {folder} was made for another model: {unknown[0]} is unknown here")
    return model


def _adapted(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    changed: torch.Tensor = getattr(module, _SLOT)(output)
    return changed


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
