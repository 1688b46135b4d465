"""LoRA that begins as what quantising the base took away, where inputs are large (LQ-LoRA, LRC).

For each adapted matrix W [out, in], its quantised Q, and inputs x of it with E x x' = L L':

    B A s  =  the best approximation of rank r of (W - Q) L, times L^-1      s: the adapter's own scale

which minimises E |(W - Q - s B A) x|^2 (Guo et al., LQ-LoRA, ICLR 2024, section 3.3, with the whole
covariance in place of its diagonal; Scetbon and Hensman, LRC, 2024). Inputs are those that random tokens
make in the base before it is quantised: every node derives the same start, and needs no text.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from fedllm.errors import ModelError
from fedllm.models.anatomy import plain
from fedllm.models.compression.importance import spread
from fedllm.randomness import stream

__all__ = ["factors", "start_from_residual"]

_TEXTS, _LENGTH, _AT_ONCE = 48, 64, 16
_RIDGE = 1e-3
"""Of the mean variance of an input, added to each: directions that few tokens show count for little."""


def start_from_residual(adapted: Any, whole: Any, seed: int) -> None:
    """Set the LoRA factors of an adapter on a quantised base, in place.

    Args:
        adapted: peft's model, its base quantised, on the CPU or a device.
        whole: the same base in float32, on the CPU.
        seed: draws the tokens.

    Raises:
        ModelError: no adapted matrix is a quantised one.
    """
    layers = {
        name: module
        for name, module in plain(adapted).named_modules()
        if hasattr(module, "lora_A") and hasattr(getattr(module, "base_layer", None), "weight")
    }
    if not layers:
        raise ModelError('tuning.start = "residual" finds no quantised matrix with a LoRA beside it')
    originals = {name: whole.get_submodule(name) for name in layers}
    inputs = spread(whole, originals, _tokens(whole, seed))
    for name, layer in layers.items():
        weight = originals[name].weight.detach()
        lost = weight - dequantize_module_weight(layer.base_layer).detach().to("cpu", torch.float32)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rise, fall = factors(lost, inputs[name], down.shape[0])
        with torch.no_grad():
            down.copy_(rise)
            up.copy_(fall / layer.scaling["default"])


def _tokens(whole: Any, seed: int) -> list[tuple[Tensor, Tensor]]:
    rows = whole.get_input_embeddings().num_embeddings
    drawn = torch.from_numpy(stream(seed, "residual").integers(rows, size=(_TEXTS, _LENGTH)))
    parts = [drawn[start : start + _AT_ONCE] for start in range(0, _TEXTS, _AT_ONCE)]
    return [(some, torch.ones_like(some)) for some in parts]


def factors(lost: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] that make up best for what was lost [out, in].

    Args:
        lost: W - Q.
        covariance: E x x' [in, in] of the inputs, up to a factor.
        rank: at most what the matrix has.

    Inputs of no spread but one leave the plain best approximation:

    >>> lost = torch.diag(torch.tensor([3.0, 1.0]))
    >>> a, b = factors(lost, torch.eye(2), 1)
    >>> torch.allclose(b @ a, torch.diag(torch.tensor([3.0, 0.0])), atol=1e-5)
    True
    """
    scaled = covariance / covariance.diagonal().mean()
    root = torch.linalg.cholesky(scaled + _RIDGE * torch.eye(len(scaled), dtype=scaled.dtype)).float()
    left, values, right = torch.linalg.svd(lost @ root, full_matrices=False)
    share = values[:rank].sqrt()
    seen = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
    return share[:, None] * seen, left[:, :rank] * share
