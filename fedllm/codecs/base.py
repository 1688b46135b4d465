"""What an update codec is: a pair of pure functions with explicit state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedllm.tensors import Spec, Tensors

__all__ = ["Codec", "CodecContext"]


@dataclass(frozen=True)
class CodecContext:
    """What sender and receiver both know about one message.

    Attributes:
        seed: run seed.
        path: what the message is, e.g. ``("up", round, node)``; with ``seed`` it keys all randomness.
        progress: share of the run that is done, in [0, 1]; schedules read it.
    """

    seed: int = 0
    path: tuple[str | int, ...] = ()
    progress: float = 0.0


class Codec(Protocol):
    """Turns named tensors into bytes and back.

    Attributes:
        linear: encoded forms may be summed before they are decoded.
        unbiased: the expectation of ``decode(encode(x))`` over seeds is ``x``.
    """

    linear: bool
    unbiased: bool

    def encode(self, tensors: Tensors, state: Tensors, context: CodecContext) -> tuple[bytes, Tensors]:
        """Return the payload and the sender's next state (residuals; empty for stateless codecs)."""
        ...

    def decode(
        self, payload: bytes, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """Return tensors of exactly ``spec`` and the receiver's next state, or raise ``CodecError``."""
        ...
