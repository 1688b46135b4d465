"""The integers, modulo a power of two, that updates are summed as: those of the plain sum, bit by bit.

codec none     round(weight * value * 2^36), as :class:`fedllm.sums.WeightedSum` adds it
codec fixed    weight * code: the plain sum adds its multiples of a power of two

Under differential privacy each client clips these integers and adds its share of the noise to them: discrete
Gaussians (Kairouz, Liu and Steinke, ICML 2021, algorithm 1), of which the shares of the fewest clients that a
sum may be of make the noise whole. There the ring is wide enough to be left once in 10^30 values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from fedllm.codecs.base import FramedCodec
from fedllm.config import RunConfig
from fedllm.errors import CodecError, ConfigError
from fedllm.privacy.noise import discrete_gaussian
from fedllm.secagg.rules import fewest
from fedllm.sums import FRACTION_BITS, in_units
from fedllm.tensors import Spec, Tensors

__all__ = ["Ring"]

_WIDEST = 64
_ROUNDING = 1e-6
"""Share by which clipping may miss its bound."""
_FINE = 4.0
"""Units that a share of noise must have at least. Sums of discrete Gaussians are then discrete Gaussians up
to a factor of 1 + 10 n exp(-16 pi^2), which is 1 (Kairouz, Liu and Steinke, ICML 2021, tau)."""
_SLACK = 1e-9
"""By which a norm that is computed in float64 may miss."""
_TAIL = 12.0
"""Standard deviations of the noise that the ring has room for: beyond lies 4e-33 of it."""


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^bits in units of 2^-fraction.

    Attributes:
        bits: of each; so few that the largest sum just fits.
        fraction: of the unit.
        most: units that one text's worth of a value has at most.
        clip: L2 norm of one client's integers at most, in units; 0 where no noise is added to them.
        noise: parameter of the noise that each client adds, in units; 0 where it adds none.
    """

    bits: int
    fraction: int
    most: int
    clip: float = 0.0
    noise: float = 0.0

    @classmethod
    def of(cls, config: RunConfig, codec: FramedCodec, weight: int) -> Self:
        """Return the ring of a sum.

        Args:
            config: of the run; ``privacy.clip`` bounds values.
            codec: of the uplink, which may bound them.
            weight: of all that is summed, at most; of clients, where each counts once.

        Raises:
            ConfigError: noise of the clients' own is too small for the unit, or too large for any ring.
        """
        privacy, fraction, most = config.privacy, FRACTION_BITS, 0
        if codec.grid is not None:
            fraction, most = codec.grid
        if privacy.update_clip is not None:
            longest = int(privacy.update_clip * (1 + _ROUNDING) * 2.0**fraction) + 1
            most = min(most or longest, longest)
        if privacy.noised:
            return cls._noised(config, fraction, most, weight)
        bits = (2 * most * weight).bit_length()
        if not most or bits > _WIDEST:
            return cls(_WIDEST, fraction, (2 ** (_WIDEST - 2) - 1) // weight)
        return cls(bits, fraction, most)

    @classmethod
    def _noised(cls, config: RunConfig, fraction: int, most: int, weight: int) -> Self:
        multiplier, clip = config.privacy.noise_multiplier, config.privacy.clip
        if multiplier is None or clip is None:
            raise RuntimeError("privacy.target_epsilon was not turned into noise: see with_noise")
        clip *= 2.0**fraction
        noise = multiplier * clip / math.sqrt(fewest(config))
        if noise < _FINE:
            raise ConfigError(
                f"codec.up = {config.codec.up!r} has steps of 2^-{fraction}, and each client's share of the "
                f"noise would be {noise:.2g} of them: take a fraction that is larger by "
                f"{math.ceil(math.log2(_FINE / noise))}, or a larger privacy.clip"
            )
        bits = (2 * (most * weight + math.ceil(_TAIL * noise * math.sqrt(weight)))).bit_length()
        if bits > _WIDEST:
            raise ConfigError(
                f"privacy.clip = {config.privacy.clip:g} and privacy.noise_multiplier = {multiplier:g} take "
                f"{bits} bits a value under privacy.secure_aggregation, which has {_WIDEST}: lower one"
            )
        return cls(bits, fraction, most, clip, noise)

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

    def private(
        self, integers: npt.NDArray[np.int64], key: Callable[[bytes], bytes]
    ) -> npt.NDArray[np.int64]:
        """Clip a client's integers once more, as rounding has moved them, and add its share of the noise.

        What is too long is scaled down and rounded towards zero, so that no rounding makes it longer.

        Args:
            integers: of :meth:`integers`, with weight 1.
            key: makes a secret key of their digest, 32 bytes.
        """
        norm = math.sqrt(float(np.square(integers.astype(np.float64)).sum())) * (1 + _SLACK)
        if norm > self.clip:
            integers = np.trunc(integers * (self.clip / norm)).astype(np.int64)
        digest = hashlib.sha256(integers.tobytes()).digest()
        return integers + discrete_gaussian(key(digest), integers.size, self.noise)

    def tensors(self, integers: npt.NDArray[np.int64], spec: Spec) -> Tensors:
        """Return a sum's integers by name; int64, in units of 2^-fraction."""
        flat, found, start = torch.from_numpy(integers), {}, 0
        for name in sorted(spec):
            found[name] = flat[start : start + spec[name].numel].reshape(spec[name].shape)
            start += spec[name].numel
        return found
