"""Named tensors: the currency that models, methods, codecs and checkpoints exchange."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedllm.errors import WireError

__all__ = [
    "Spec",
    "TensorSpec",
    "Tensors",
    "dense_bytes",
    "digest",
    "fingerprint",
    "norm_of",
    "pack",
    "spec_of",
    "unpack",
]

Tensors = dict[str, torch.Tensor]
"""Tensors by name, on the CPU. Whoever serialises them does so in sorted name order."""


@dataclass(frozen=True)
class TensorSpec:
    """What a receiver expects of one tensor: its shape and dtype bound every allocation.

    >>> TensorSpec((2, 3), torch.float32).nbytes
    24
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values uncompressed."""
        return self.numel * self.dtype.itemsize


Spec = Mapping[str, TensorSpec]
"""The tensors that a receiver expects, by name."""


def spec_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """Describe tensors without their values."""
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def dense_bytes(spec: Spec) -> int:
    """Bytes of the tensors uncompressed, without names or headers."""
    return sum(item.nbytes for item in spec.values())


def norm_of(tensors: Mapping[str, torch.Tensor]) -> float:
    """L2 norm over all tensors together.

    >>> norm_of({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    5.0
    """
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Concatenate raw little-endian values in sorted name order; names and shapes travel in the spec.

    >>> len(pack({"b": torch.zeros(3), "a": torch.zeros(2, dtype=torch.bfloat16)}))
    16
    """
    return b"".join(_raw(tensors[name]) for name in sorted(tensors))


def unpack(data: bytes | memoryview, spec: Spec) -> Tensors:
    """Invert :func:`pack`; raises ``WireError`` unless ``data`` is exactly as long as ``spec`` says.

    >>> unpack(pack({"a": torch.ones(2)}), {"a": TensorSpec((2,))})["a"].tolist()
    [1.0, 1.0]
    """
    expected = dense_bytes(spec)
    if len(data) != expected:
        raise WireError(f"dense payload holds {len(data)} bytes, the receiver expects {expected}")
    tensors: Tensors = {}
    buffer = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if expected
        else torch.empty(0, dtype=torch.uint8)
    )
    offset = 0
    for name in sorted(spec):
        item = spec[name]
        # A slice may start off the dtype's alignment, so each tensor gets memory of its own.
        raw = buffer[offset : offset + item.nbytes].clone()
        tensors[name] = raw.view(item.dtype).reshape(item.shape)
        offset += item.nbytes
    return tensors


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the raw bytes, name-sorted: equal exactly when every bit is equal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()


def digest(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return 63 bits of :func:`fingerprint`: enough to notice that two machines have drifted apart."""
    return int(fingerprint(tensors)[:16], 16) >> 1
