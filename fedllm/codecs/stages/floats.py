"""Quantizers whose codes are floating-point formats: bfloat16, float16 and NormalFloat4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedllm.codecs.base import Buffer, CodecContext, Reader
from fedllm.codecs.chain import Array, Coder, Rows, Shapes, cut
from fedllm.codecs.stages.bits import Codes
from fedllm.codecs.stages.quantize import BlockQuantizer, nearest, require_block
from fedllm.errors import CodecError, ConfigError

__all__ = ["Cast", "NormalFloat4"]


@dataclass(frozen=True)
class Cast:
    """``cast``: every value as bfloat16 or float16, rounded to the nearest.

    The two bytes of a value are coded apart, since only sign and exponent have few likely values.

    Attributes:
        dtype: ``bf16`` (the range of float32, 8 significant bits) or ``fp16`` (up to 65504, 11 bits).
    """

    dtype: str

    name = "cast"
    example = "cast(bf16)"
    rate = "16"
    cost = "O(n)"
    kind = "quantizer"
    linear = False
    unbiased = False
    contractive = True

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"cast takes bf16 or fp16, got {self.dtype}")

    def contracted(self) -> Self:
        """Return itself."""
        return self

    def encode(self, rows: Rows, coder: Coder, context: CodecContext) -> Sequence[Buffer]:
        """Return all low bytes, then all high bytes."""
        values = torch.cat([torch.from_numpy(matrix).reshape(-1).to(_DTYPES[self.dtype]) for matrix in rows])
        if not torch.isfinite(values).all():
            raise CodecError(f"cannot encode values beyond the largest of {self.dtype}")
        planes = np.ascontiguousarray(values.view(torch.uint8).numpy().reshape(-1, 2).T)
        return [part for plane in planes for part in coder.encode(plane, 256)]

    def decode(self, reader: Reader, shapes: Shapes, coder: Coder, context: CodecContext) -> Rows:
        """Return the values."""
        count = sum(height * width for height, width in shapes)
        planes = np.stack([coder.decode(reader, count, 256) for _ in range(2)], axis=1)
        values = torch.from_numpy(planes).view(_DTYPES[self.dtype]).reshape(-1).to(torch.float32)
        return cut(values.numpy(), shapes)


@dataclass(frozen=True)
class NormalFloat4(BlockQuantizer):
    """``nf4``: 16 levels at the quantiles of a normal distribution, times the block's largest magnitude.

    The data type of QLoRA (Dettmers et al., NeurIPS 2023, section 3).

    Attributes:
        block: values that share a scale, at least 8; costs 32 / block bits a value.
    """

    block: int = 64

    name = "nf4"
    example = "nf4"
    rate = "4 + 32/block"
    cost = "O(n)"
    bits = 4
    unbiased = False
    contractive = True

    def __post_init__(self) -> None:
        require_block("nf4", self.block)

    def quantize(
        self, x: Tensor, bits: int, random: np.random.Generator, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """See :meth:`BlockQuantizer.quantize`."""
        largest = torch.abs(x, out=scratch).amax(dim=1)
        nearest(x, _levels(), largest, out, scratch)
        return largest

    def dequantize(self, codes: Codes, bits: int, scales: Tensor, out: Tensor) -> None:
        """See :meth:`BlockQuantizer.dequantize`."""
        np.take(_levels(), codes, out=out.numpy(), mode="clip")
        out *= scales


STAGES = (Cast, NormalFloat4)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def _levels() -> Array:
    """Return seven negative quantiles, zero and eight positive ones, scaled to [-1, 1].

    >>> [round(float(level), 4) for level in _levels()[[0, 1, 7, 8, 15]]]
    [-1.0, -0.6962, 0.0, 0.0796, 1.0]
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (outermost - 0.5) * step / 8) for step in range(1, 9)]
    negative = [-quantile(0.5 + (outermost - 0.5) * step / 7) for step in range(7, 0, -1)]
    return np.array([*negative, 0.0, *positive], np.float32) / np.float32(quantile(outermost))
