"""The integers, modulo a power of two, that updates are summed as: those of the plain sum, bit by bit.

codec none     round(weight * value * 2^36), as :class:`fedllm.sums.WeightedSum` adds it
codec fixed    weight * code: the plain sum adds its multiples of a power of two
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from fedllm.codecs.base import FramedCodec
from fedllm.config import RunConfig
from fedllm.errors import CodecError
from fedllm.sums import FRACTION_BITS, in_units
from fedllm.tensors import Spec, Tensors

__all__ = ["Ring"]

_WIDEST = 64
_ROUNDING = 1e-6
"""Share by which clipping may miss its bound."""


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^bits in units of 2^-fraction.

    Attributes:
        bits: of each; so few that the largest sum just fits.
        fraction: of the unit.
        most: units that one text's worth of a value has at most.
    """

    bits: int
    fraction: int
    most: int

    @classmethod
    def of(cls, config: RunConfig, codec: FramedCodec, weight: int) -> Self:
        """Return the ring of a sum.

        Args:
            config: of the run; ``privacy.clip`` bounds values.
            codec: of the uplink, which may bound them.
            weight: of all that is summed, at most.
        """
        fraction, most = FRACTION_BITS, 0
        if codec.grid is not None:
            fraction, most = codec.grid
        elif config.privacy.clip is not None:
            most = int(config.privacy.clip * (1 + _ROUNDING) * 2.0**FRACTION_BITS) + 1
        bits = (2 * most * weight).bit_length()
        if not most or bits > _WIDEST:
            return cls(_WIDEST, fraction, (2 ** (_WIDEST - 2) - 1) // weight)
        return cls(bits, fraction, most)

    def integers(self, tensors: Tensors, weight: int) -> npt.NDArray[np.int64]:
        """Return weighted values as integers, by sorted names.

        Raises:
            CodecError: one is larger than the ring has room for.
        """
        units = [in_units(tensors[name].reshape(-1), weight, self.fraction) for name in sorted(tensors)]
        flat = torch.cat(units) if units else torch.zeros(0, dtype=torch.float64)
        largest = float(flat.abs().max()) if flat.numel() else 0.0
        if not largest <= self.most * weight:
            raise CodecError(
                f"a value of {largest / weight * 2.0**-self.fraction:.3g} has no room in a secure sum of "
                f"{self.bits} bits a value, which ends at {self.most * 2.0**-self.fraction:.3g}"
            )
        return flat.to(torch.int64).numpy()

    def tensors(self, integers: npt.NDArray[np.int64], spec: Spec) -> Tensors:
        """Return a sum's integers by name; int64, in units of 2^-fraction."""
        flat, found, start = torch.from_numpy(integers), {}, 0
        for name in sorted(spec):
            found[name] = flat[start : start + spec[name].numel].reshape(spec[name].shape)
            start += spec[name].numel
        return found
