"""A device that this machine does not have: tensors on it refuse to meet tensors that are not there.

They say that they are on ``meta`` and compute on the CPU behind that, so that runs come out with numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")

_CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class There(torch.Tensor):
    """A tensor on the pretended device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While this is entered, ``tensor.to(DEVICE)`` gives a tensor that is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
    met = there = any(isinstance(tensor, There) for tensor in tensors)
    strangers = [t for t in tensors if not isinstance(t, There) and t.dim()]
    if there and strangers and func not in _CROSSING:
        raise RuntimeError(
            f"{func}: expected all tensors to be on one device, but one of shape {tuple(strangers[0].shape)} "
            "is on the CPU"
        )
    if "device" in kwargs and kwargs["device"] is not None:
        there = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], There)
    plain = [tree_map(lambda x: x.inner if isinstance(x, There) else x, part) for part in (args, kwargs)]
    found = func(*plain[0], **plain[1])
    if not there:
        return found
    wrapped = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, found)
    # What has just come over shares nothing with what it was on the CPU.
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if met else wrapped
