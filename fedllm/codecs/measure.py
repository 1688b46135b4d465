"""What a codec did to one message, for live tables, reports and benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from fedllm.codecs.base import CodecContext, Dense, FramedCodec
from fedllm.tensors import Spec, Tensors, TensorSpec, dense_bytes, spec_of

__all__ = ["Measurement", "growth", "measure", "relative_error"]


@dataclass(frozen=True)
class Measurement:
    """Size and error of one encoded message.

    Attributes:
        bytes: the whole payload.
        dense_bytes: the tensors uncompressed.
        values: how many there are.
        error: ``|x - decoded| / |x|``; feedback codecs send x plus a residual, and this is still against x.
        parts: bytes by what they hold: header, scales, codes, indices, ranks, frequencies, values, dense.
    """

    bytes: int
    dense_bytes: int
    values: int
    error: float
    parts: dict[str, int]

    @property
    def ratio(self) -> float:
        """Dense bytes over payload bytes."""
        return self.dense_bytes / self.bytes

    @property
    def bits(self) -> float:
        """Payload bits per value."""
        return 8 * self.bytes / max(1, self.values)


def measure(
    codec: FramedCodec, tensors: Tensors, context: CodecContext, state: Tensors | None = None
) -> Measurement:
    """Encode and decode once; nobody's state changes.

    >>> import torch
    >>> from fedllm.codecs import parse
    >>> result = measure(parse("quantize(bits=4)"), {"a": torch.ones(1000)}, CodecContext())
    >>> result.bytes, result.parts
    (514, {'header': 10, 'scales': 4, 'codes': 500})
    """
    spec = spec_of(tensors)
    payload, _ = codec.encode(tensors, state or {}, context)
    decoded, _, parts = codec.inspect(payload, spec, state or {}, context)
    return Measurement(
        bytes=len(payload),
        dense_bytes=dense_bytes(spec),
        values=sum(item.numel for item in spec.values()),
        error=relative_error(tensors, decoded),
        parts=dict(parts),
    )


def growth(codec: FramedCodec, spec: Spec) -> float:
    """Return how many times longer a first update is after the codec than before; 1 where it is shorter.

    Measured on one update whose values are of about one magnitude, as those of AdamW's steps are: what
    sends a few of them, each multiplied, is then not at the mercy of which it sends.

    Args:
        codec: whose sender and receiver begin.
        spec: of the update.

    Raises:
        CodecError: the codec does not fit such updates.

    >>> from fedllm.codecs import parse
    >>> round(growth(parse("random_k(fraction=0.01)"), {"w": TensorSpec((100, 100))}))
    10
    """
    return 1.0 if isinstance(codec, Dense) else _growth(codec, tuple(sorted(spec.items())))


@lru_cache(maxsize=8)
def _growth(codec: FramedCodec, spec: tuple[tuple[str, TensorSpec], ...]) -> float:
    random = torch.Generator().manual_seed(0)
    update: Tensors = {}
    for name, like in spec:
        sign = torch.randint(2, like.shape, generator=random) * 2 - 1
        update[name] = sign * (0.5 + torch.rand(like.shape, generator=random)) * 1e-3
    context = CodecContext(path=("rehearsal",), progress=1.0)
    payload, _ = codec.encode(update, {}, context)
    decoded, _ = codec.decode(payload, dict(spec), {}, context)
    before, after = (
        math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
        for tensors in (update, decoded)
    )
    return max(1.0, after / before) if before else 1.0


def relative_error(wanted: Tensors, got: Tensors) -> float:
    """Return ``|wanted - got| / |wanted|`` over all tensors; 0 where both are zero.

    >>> import torch
    >>> relative_error({"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 0.0])})
    0.8
    """
    error = sum(
        float((tensor.double() - got[name].double()).square().sum()) for name, tensor in wanted.items()
    )
    norm = sum(float(tensor.double().square().sum()) for tensor in wanted.values())
    return (error / norm) ** 0.5 if norm else float(error > 0)
