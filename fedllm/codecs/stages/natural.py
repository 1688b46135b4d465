"""A quantizer whose levels are powers of two: as precise for small values as for large ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm.codecs.stages.bits import Codes
from fedllm.codecs.stages.quantize import BlockQuantizer, dither, inverse, require_block
from fedllm.errors import ConfigError

__all__ = ["Natural"]


@dataclass(frozen=True)
class Natural(BlockQuantizer):
    """``natural``: rounds each value up or down to a power of two, at random with the right mean.

    Natural dithering (Horvath et al., MSML 2022): levels are zero and plus and minus 2^-j times the block's
    largest magnitude, j from 0 to ``2**(bits-1) - 2``. The variance of a value above the smallest of them is
    at most an eighth of its square, however small it is beside the largest.

    Attributes:
        bits: 2 to 6; each about doubles the number of powers of two: 31 at six, down to 1e-9 of the largest.
        block: values that share a scale, at least 8; costs 32 / block bits a value.
    """

    bits: int
    block: int = 4096

    name = "natural"
    example = "natural(bits=4)"
    rate = "bits + 32/block"
    cost = "O(n)"
    unbiased = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 6:
            raise ConfigError(f"natural takes bits from 2 to 6, got {self.bits}")
        require_block("natural", self.block)

    @property
    def contractive(self) -> bool:
        """Below the smallest level l a variance is at most l^2 / 4: a block of them must stay below 7/8."""
        return 8 * self.block < 7 << 2 * self._powers

    def quantize(
        self, x: Tensor, bits: int, random: np.random.Generator, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """See :meth:`BlockQuantizer.quantize`; code s is zero, s + k and s - k the k-th power of two."""
        s = self._powers
        largest = torch.abs(x, out=scratch).amax(dim=1)
        y = scratch.mul_(inverse(largest)[:, None])
        mantissa, exponent = torch.frexp(y)
        small = y < 2.0 ** (1 - s)
        power = torch.where(small, 0, exponent + s - 1)
        share = torch.where(small, y * 2 ** (s - 1), 2 * mantissa - 1)
        power += torch.from_numpy(dither(random, tuple(x.shape))) < share
        power.clamp_(max=s)
        out.copy_(torch.where(x < 0, s - power, s + power))
        return largest

    def dequantize(self, codes: Codes, bits: int, scales: Tensor, out: Tensor) -> None:
        """See :meth:`BlockQuantizer.dequantize`; the one code that is never sent reads as zero."""
        s = self._powers
        powers = 2.0 ** np.arange(1 - s, 1)
        levels = np.concatenate([-powers[::-1], [0.0], powers, [0.0]]).astype(np.float32)
        np.take(levels, codes, out=out.numpy())
        out *= scales

    @property
    def _powers(self) -> int:
        """How many powers of two there are, s in the paper."""
        return int((1 << self.bits - 1) - 1)


STAGES = (Natural,)
