"""Calling a module with other tensors in place of its trained ones, also where layers share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["call"]


def call(module: nn.Module, values: Mapping[str, torch.Tensor], **inputs: Any) -> Any:
    """Call ``module`` as if its parameters had ``values``, and leave it exactly as it was.

    ``torch.func.functional_call`` counts a module that several layers share once for every layer: it puts
    the value in twice, takes the first one for the original, and never puts the parameter itself back.
    Here each place that holds a parameter is named once.

    Args:
        module: called with ``inputs``.
        values: by the names that ``module.named_parameters()`` gives, each once.
        inputs: keyword arguments of the call.

    >>> shared = nn.Linear(1, 1, bias=False)
    >>> module, double = nn.Sequential(shared, shared), {"0.weight": torch.full((1, 1), 2.0)}
    >>> call(module, double, input=torch.ones(1, 1)).item(), module[0].weight is shared.weight
    (4.0, True)
    >>> shared.weight.requires_grad
    True
    """
    named = {id(parameter): values[n] for n, parameter in module.named_parameters() if n in values}
    places = {place: named[id(parameter)] for place, parameter in _places(module) if id(parameter) in named}
    return torch.func.functional_call(module, places, kwargs=inputs, tie_weights=False)


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every place that holds a parameter; tied ones are several places, a shared module is one."""
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, parameter
