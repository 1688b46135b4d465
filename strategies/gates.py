"""What a decoded reply must satisfy before it may touch the global tensors."""

from __future__ import annotations

import torch

from fedllm.errors import RejectedReply
from fedllm.tensors import Spec, Tensors, spec_of

__all__ = ["check"]


def check(tensors: Tensors, spec: Spec, *, max_norm: float | None) -> None:
    """Let a reply pass or say why not.

    Args:
        tensors: the decoded answer.
        spec: the names, shapes and dtypes that were asked for.
        max_norm: largest L2 norm over all tensors together; ``None`` for no bound.

    Raises:
        RejectedReply: names the first gate that the reply fails.
    """
    found = spec_of(tensors)
    for name in sorted(spec.keys() | found.keys()):
        if name not in found or name not in spec:
            raise RejectedReply(f"tensor {name} is {'missing' if name in spec else 'not asked for'}")
        if found[name] != spec[name]:
            raise RejectedReply(f"tensor {name} is {found[name]}, asked for was {spec[name]}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise RejectedReply(f"tensor {name} holds NaN or infinity")
    if max_norm is not None:
        norm = sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5
        if norm > max_norm:
            raise RejectedReply(f"update norm {norm:.4g} exceeds server.max_update_norm = {max_norm:g}")
