"""The quantizer whose codes of different senders can be added: one grid for all values of all messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fedllm.codecs.base import Buffer, CodecContext, Reader
from fedllm.codecs.chain import Array, Coder, Rows, Shapes, cut, generator
from fedllm.codecs.stages.quantize import dither
from fedllm.errors import CodecError, ConfigError

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed:
    """``fixed``: multiples of a power of two that all agree on in advance; what is larger is cut off.

    A code is ``x * 2^fraction``, rounded to the nearest integer or, ``stochastic``, up or down at random with
    the right mean, and bounded by ``2^(bits-1) - 1``. A scale would save it from being cut off, and would be
    another for each client: under secure aggregation codes are added before anybody decodes them.

    Attributes:
        bits: of a code, 2 to 16.
        fraction: of the step 2^-fraction, 0 to 36; the largest value is ``(2^(bits-1) - 1) / 2^fraction``.
        stochastic: round at random.
    """

    bits: int
    fraction: int
    stochastic: bool = False

    name = "fixed"
    example = "fixed(bits=8, fraction=12)"
    rate = "bits"
    cost = "O(n)"
    kind = "quantizer"
    linear = False
    unbiased = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16 or not 0 <= self.fraction <= 36:
            raise ConfigError(
                f"fixed takes bits from 2 to 16 and fraction from 0 to 36, not {self.bits}, {self.fraction}"
            )

    @property
    def contractive(self) -> bool:
        """Rounding to the nearest is: zero is on the grid."""
        return not self.stochastic

    def contracted(self) -> Self:
        """Return the one that rounds to the nearest."""
        return replace(self, stochastic=False)

    @property
    def grid(self) -> tuple[int, int]:
        """See :attr:`fedllm.codecs.base.FramedCodec.grid`."""
        return self.fraction, self._largest

    def encode(self, rows: Rows, coder: Coder, context: CodecContext) -> Sequence[Buffer]:
        """Return all low bytes, then all high bytes where there are any."""
        x = np.concatenate([row.reshape(-1) for row in rows]).astype(np.float64) * 2.0**self.fraction
        if self.stochastic:
            whole = np.floor(x)
            codes = whole + (dither(generator(context, "fixed"), x.shape) < x - whole)
        else:
            codes = np.rint(x)
        context.notes["cut_off"] = float(np.count_nonzero(np.abs(codes) > self._largest)) / max(x.size, 1)
        bounded = np.clip(codes, -self._largest, self._largest).astype(np.int32) + self._largest
        low, high = self._alphabets
        parts = list(coder.encode((bounded % low).astype(np.uint8), low))
        return parts + (list(coder.encode((bounded // low).astype(np.uint8), high)) if high else [])

    def decode(self, reader: Reader, shapes: Shapes, coder: Coder, context: CodecContext) -> Rows:
        """Return multiples of the step, exactly."""
        count = sum(height * width for height, width in shapes)
        low, high = self._alphabets
        codes = coder.decode(reader, count, low).astype(np.int32)
        if high:
            codes += coder.decode(reader, count, high).astype(np.int32) * low
        codes -= self._largest
        if codes.size and int(codes.max()) > self._largest:
            raise CodecError("a code of fixed exceeds the largest")
        values: Array = codes.astype(np.float32) * np.float32(2.0**-self.fraction)
        return cut(values, shapes)

    @property
    def _largest(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def _alphabets(self) -> tuple[int, int]:
        """Values of the low byte of a code, and of the high one, 0 where there is none."""
        return (1 << min(self.bits, 8), 1 << self.bits - 8 if self.bits > 8 else 0)


STAGES = (Fixed,)
