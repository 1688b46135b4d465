"""Error feedback: what one message loses, the next one carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.codecs.base import Buffer, CodecContext, FramedCodec, Reader
from fedllm.errors import CodecError, ConfigError
from fedllm.tensors import Spec, Tensors, spec_of

__all__ = ["EF21", "ErrorFeedback"]


class Feedback(FramedCodec):
    """What both kinds share: a contraction inside, and a state of one float32 tensor per encoded tensor."""

    inner: FramedCodec
    name: str
    contractive = True
    stateful = True

    def __post_init__(self) -> None:
        if self.inner.stateful:
            raise ConfigError(f"{self.name} cannot wrap {self.inner}, which carries its own residual")
        if not self.inner.contracted().contractive:
            raise ConfigError(f"{self.name} needs a codec that never grows an error, and {self.inner} may")

    def __str__(self) -> str:
        return f"{self.name}({self.inner})"

    def contracted(self) -> Feedback:
        """Return itself."""
        return self

    def misfit(self, spec: Spec) -> str:
        """Ask the codec inside, as it is used."""
        return self.inner.contracted().misfit(spec)

    def _sent(self, tensors: Tensors, context: CodecContext) -> tuple[Sequence[Buffer], Tensors]:
        """Encode with the inner codec; return the body and, in float32, what a receiver makes of it."""
        inner = self.inner.contracted()
        parts, _ = inner.write(tensors, {}, context)
        decoded, _ = inner.read(Reader(b"".join(parts)), spec_of(tensors), {}, context)
        return parts, {name: tensor.to(torch.float32) for name, tensor in decoded.items()}


@dataclass(frozen=True)
class ErrorFeedback(Feedback):
    """``error_feedback``: send C(x + e), keep e' = x + e - C(x + e) (Karimireddy et al., ICML 2019).

    The sum of all decoded messages plus the last residual is the sum of all inputs.

    Attributes:
        inner: the codec C; its smallest-error variant is used.
    """

    inner: FramedCodec
    name = "error_feedback"
    example = "error_feedback(rotate | quantize(bits=1))"
    rate = "of the codec inside"
    cost = "encoding and decoding of the codec inside"

    def write(
        self, tensors: Tensors, state: Tensors, context: CodecContext
    ) -> tuple[Sequence[Buffer], Tensors]:
        """Encode input plus residual; the state is the residual, zero where there is none yet."""
        wanted = {
            name: tensor.to(torch.float32) + _carried(state, name, tensor) for name, tensor in tensors.items()
        }
        parts, sent = self._sent({name: wanted[name].to(tensors[name].dtype) for name in wanted}, context)
        return parts, {name: wanted[name] - sent[name] for name in wanted}

    def read(
        self, reader: Reader, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """Decode as the inner codec does."""
        tensors, _ = self.inner.contracted().read(reader, spec, {}, context)
        return tensors, state


@dataclass(frozen=True)
class EF21(Feedback):
    """``ef21``: both sides keep an estimate g and add C(x - g) to it (Richtarik et al., NeurIPS 2021).

    What is decoded is the new estimate itself, so the receiver has a state too, one per sender.

    Attributes:
        inner: the codec C; its smallest-error variant is used.
    """

    inner: FramedCodec
    name = "ef21"
    example = "ef21(top_k(fraction=0.01) | quantize(bits=8))"
    rate = "of the codec inside"
    cost = "encoding and decoding of the codec inside"

    def write(
        self, tensors: Tensors, state: Tensors, context: CodecContext
    ) -> tuple[Sequence[Buffer], Tensors]:
        """Encode input minus estimate; the state is the next estimate."""
        estimate = {name: _carried(state, name, tensor) for name, tensor in tensors.items()}
        change = {
            name: (tensor.to(torch.float32) - estimate[name]).to(tensor.dtype)
            for name, tensor in tensors.items()
        }
        parts, sent = self._sent(change, context)
        return parts, {name: estimate[name] + sent[name] for name in sent}

    def read(
        self, reader: Reader, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """Decode the change, return the next estimate as tensors and as state."""
        change, _ = self.inner.contracted().read(reader, spec, {}, context)
        estimate = {
            name: _carried(state, name, part) + part.to(torch.float32) for name, part in change.items()
        }
        return {name: tensor.to(spec[name].dtype) for name, tensor in estimate.items()}, estimate


STAGES = (ErrorFeedback, EF21)


def _carried(state: Tensors, name: str, like: torch.Tensor) -> torch.Tensor:
    if name not in state:
        return torch.zeros(like.shape)
    if state[name].shape != like.shape:
        raise CodecError(
            f"the residual of {name} has shape {list(state[name].shape)}, the update {list(like.shape)}"
        )
    return state[name]
