"""What a codec did to one message, for live tables, reports and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.codecs.base import CodecContext, FramedCodec
from fedllm.tensors import Tensors, dense_bytes, spec_of

__all__ = ["Measurement", "measure", "relative_error"]


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
