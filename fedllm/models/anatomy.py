"""What is where in a transformers model, out of its adapter: the one place that looks for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedllm.errors import ModelError

__all__ = ["layers", "longest_stack", "plain", "width"]


def plain(backbone: Any) -> Any:
    """Return the transformers model, taken out of the adapter in which it may be."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def layers(backbone: Any) -> Any:
    """Return the model's layers: the first list that is as long as its configuration says it is deep.

    Raises:
        ModelError: there is no such list.
    """
    model = plain(backbone)
    depth = int(model.config.num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(f"{type(model).__name__} keeps its {depth} layers where they cannot be found")


def longest_stack(module: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the longest list of modules in any module, with its name; nothing where there is none of two.

    What is asked may be half a model, or one that a method has shortened: no configuration is read.
    """
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return max(found, key=lambda item: len(item[1]), default=None)


def width(backbone: Any) -> int:
    """Return the width of the model's hidden states."""
    return int(plain(backbone).config.hidden_size)
