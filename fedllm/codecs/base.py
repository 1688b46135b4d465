"""What an update codec is, and the frame that every message of every codec travels in.

A message is ``version (1 byte) | codec id (4) | CRC-32 of id and body (4) | body``. The codec id is a hash of
the codec's canonical text, so two sides that are configured differently find out before they decode. Only the
body differs between codecs; it never states how large the decoded tensors are, because the receiver's own
:data:`~fedllm.tensors.Spec` says so and bounds every allocation.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from fedllm.errors import CodecError
from fedllm.tensors import Spec, Tensors, dense_bytes, pack, unpack

__all__ = [
    "HEADER_BYTES",
    "Buffer",
    "Codec",
    "CodecContext",
    "Dense",
    "FramedCodec",
    "Reader",
    "one_thread",
    "require_finite",
]

VERSION = 2
_HEADER = struct.Struct("<BII")
HEADER_BYTES = _HEADER.size + 1
"""What a message may exceed the uncompressed tensors by: the frame, and a byte that says if it is coded."""

Buffer = bytes | memoryview


@dataclass(frozen=True)
class CodecContext:
    """What sender and receiver both know about one message.

    Attributes:
        seed: run seed.
        path: what the message is, e.g. ``("up", round, node)``; with ``seed`` it keys all randomness.
        progress: share of the run that is done, in [0, 1]; schedules read it.
        notes: what stages tell people about the encoding, such as ranks; nobody decodes by it.
    """

    seed: int = 0
    path: tuple[str | int, ...] = ()
    progress: float = 0.0
    notes: dict[str, float] = field(default_factory=dict, compare=False)


class Codec(Protocol):
    """Turns named tensors into bytes and back.

    Attributes:
        linear: for a fixed context, decoding is additive: decode(encode(x)) + decode(encode(y)) is
            decode(encode(x + y)).
        unbiased: the expectation of ``decode(encode(x))`` over seeds is ``x``.
    """

    @property
    def linear(self) -> bool:
        """See above."""
        ...

    @property
    def unbiased(self) -> bool:
        """See above."""
        ...

    def encode(self, tensors: Tensors, state: Tensors, context: CodecContext) -> tuple[bytes, Tensors]:
        """Return the payload and the sender's next state (residuals; empty for stateless codecs)."""
        ...

    def decode(
        self, payload: bytes, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """Return tensors of exactly ``spec`` and the receiver's next state, or raise ``CodecError``."""
        ...


class Reader:
    """A cursor over untrusted bytes that never hands out more than there is, and counts who took what."""

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data)
        self._offset = 0
        self.taken: Counter[str] = Counter()

    def take(self, size: int, part: str) -> memoryview:
        """Return the next ``size`` bytes, which hold ``part``."""
        end = self._offset + size
        if end > len(self._data):
            raise CodecError(f"payload ends inside its {part}: {end - len(self._data)} bytes are missing")
        view = self._data[self._offset : end]
        self._offset = end
        self.taken[part] += size
        return view

    def number(self, part: str) -> int:
        """Return the next four bytes as an unsigned number."""
        return int.from_bytes(self.take(4, part), "little")

    def finish(self) -> None:
        """Raise ``CodecError`` unless every byte was taken."""
        if self._offset != len(self._data):
            raise CodecError(f"payload has {len(self._data) - self._offset} bytes too many")


class FramedCodec(ABC):
    """A codec whose subclasses write and read bodies; frame and checks are the same for all."""

    @property
    def linear(self) -> bool:
        """For a fixed context, decoding is additive."""
        return False

    @property
    def unbiased(self) -> bool:
        """The expectation of what is decoded is what was encoded."""
        return False

    @property
    def contractive(self) -> bool:
        """``|x - decode(encode(x))| <= |x|`` in expectation, which error feedback needs to converge."""
        return False

    @property
    def stateful(self) -> bool:
        """Residuals or estimates are carried from message to message."""
        return False

    @property
    def grid(self) -> tuple[int, int] | None:
        """(f, m) if every sender's values are multiples of 2^-f, up to m of them: such codes can be added."""
        return None

    @abstractmethod
    def __str__(self) -> str:
        """Return the canonical text: parsing it gives an equal codec."""

    @abstractmethod
    def write(
        self, tensors: Tensors, state: Tensors, context: CodecContext
    ) -> tuple[Sequence[Buffer], Tensors]:
        """Return the body in parts, and the sender's next state."""

    @abstractmethod
    def read(
        self, reader: Reader, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """Read one body; return tensors of exactly ``spec`` and the receiver's next state."""

    def contracted(self) -> FramedCodec:
        """Return the variant with the smallest error, which error feedback uses; by default itself."""
        return self

    def misfit(self, spec: Spec) -> str:
        """Say what of this codec cannot be meant for messages of these tensors, or of some.

        Returns:
            A sentence; empty if nothing is wrong.
        """
        return ""

    def encode(self, tensors: Tensors, state: Tensors, context: CodecContext) -> tuple[bytes, Tensors]:
        """See :meth:`Codec.encode`. NaN, infinite or non-float values raise ``CodecError``."""
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        require_finite(tensors, "cannot encode")
        with one_thread(), np.errstate(all="ignore"):  # pieces look for overflow where it matters
            parts, state = self.write(tensors, state, context)
        identity = self._identity()
        header = _HEADER.pack(VERSION, identity, _checksum(identity, parts))
        return b"".join([header, *parts]), state

    def decode(
        self, payload: bytes, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """See :meth:`Codec.decode`."""
        tensors, state, _ = self.inspect(payload, spec, state, context)
        return tensors, state

    def inspect(
        self, payload: bytes, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors, Counter[str]]:
        """Decode, and also return the bytes that each part of the payload took."""
        reader = Reader(payload)
        version, identity, checksum = _HEADER.unpack(reader.take(_HEADER.size, "header"))
        if version != VERSION:
            raise CodecError(f"payload has format version {version}, this build reads version {VERSION}")
        if identity != self._identity():
            raise CodecError(
                f"payload was not encoded by {self}: sender and receiver are configured differently"
            )
        if checksum != _checksum(identity, [memoryview(payload)[_HEADER.size :]]):
            raise CodecError("payload is damaged: its checksum does not match")
        with one_thread(), np.errstate(all="ignore"):  # hostile scales overflow; see require_finite below
            tensors, state = self.read(reader, spec, state, context)
        reader.finish()
        require_finite(tensors, "decoding gave")
        return tensors, state, reader.taken

    def _identity(self) -> int:
        return int.from_bytes(hashlib.blake2b(str(self).encode(), digest_size=4).digest(), "little")


@dataclass(frozen=True)
class Dense(FramedCodec):
    """``none``: the values as they are.

    >>> payload, _ = Dense().encode({"a": torch.ones(100)}, {}, CodecContext())
    >>> len(payload)
    409
    """

    name = "none"
    example = "none"
    rate = "of the tensors' dtype"
    cost = "one copy"
    linear = True
    unbiased = True
    contractive = True

    def __str__(self) -> str:
        return "none"

    def write(
        self, tensors: Tensors, state: Tensors, context: CodecContext
    ) -> tuple[Sequence[Buffer], Tensors]:
        """Return raw values."""
        return [pack(tensors)], state

    def read(
        self, reader: Reader, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """Return the values."""
        return unpack(reader.take(dense_bytes(spec), "dense"), spec), state


STAGES = (Dense,)


def require_finite(tensors: Tensors, what: str) -> None:
    """Raise ``CodecError`` naming the first tensor that holds NaN, an infinity or no floats at all."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if not tensor.dtype.is_floating_point:
            raise CodecError(f"{what} {name}: it holds {tensor.dtype}, updates are floats")
        # A sum is one fast pass and finite only if every value is; large finite values may overflow it.
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if not torch.isfinite(tensor.sum(dtype=wide)) and not torch.isfinite(tensor).all():
            raise CodecError(f"{what} {name} with NaN or infinite values")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: the last bits of sums depend on how many there are.

    It is also the safer speed. The steps are short, and on a host that others use as well, threads that wait
    for one another at the end of each step made 4 million values up to thirty times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _checksum(identity: int, parts: Iterable[Buffer]) -> int:
    value = zlib.crc32(bytes([VERSION]) + identity.to_bytes(4, "little"))
    for part in parts:
        value = zlib.crc32(part, value)
    return value
