"""A chain: named tensors -> rows of floats -> integer codes -> bytes, and back.

Four kinds of piece, always in this order, so that one line of text can spell any chain:

    layout      tensors -> rows     low_rank, or the concatenation that goes without saying
    transform   rows -> rows        rotate, top_k, random_k (any number of them)
    quantizer   rows -> codes       quantize, sign, nf4, cast, or the floats as they are
    coder       codes -> bytes      entropy, or plain packing

``Rows`` are float32 matrices; a quantizer never lets two rows share a scale. Every piece can tell the shapes
of what it makes from the shapes of what it takes and its own few bytes of side information: that is how a
receiver knows each size before it allocates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from fedllm.codecs.base import Buffer, CodecContext, FramedCodec, Reader
from fedllm.codecs.stages.bits import Codes
from fedllm.errors import CodecError
from fedllm.randomness import stream
from fedllm.tensors import Spec, Tensors, dense_bytes, pack, spec_of, unpack

__all__ = [
    "Array",
    "Chain",
    "Coder",
    "Layout",
    "Quantizer",
    "Rows",
    "Shapes",
    "Transform",
    "cut",
    "generator",
    "raw_words",
    "spell",
]

Array = npt.NDArray[np.float32]

Rows = list[Array]
"""Float32 matrices [rows, width]."""

Shapes = list[tuple[int, int]]


class Piece(Protocol):
    """What all four kinds declare; see :class:`~fedllm.codecs.base.FramedCodec`."""

    @property
    def linear(self) -> bool: ...
    @property
    def unbiased(self) -> bool: ...
    @property
    def contractive(self) -> bool: ...
    def contracted(self) -> Self:
        """Return the variant with the smallest error; most pieces return themselves."""
        ...


class Layout(Piece, Protocol):
    """Tensors to rows."""

    @property
    def multiplies(self) -> bool:
        """Whether tensors are products of rows, so that errors of rows multiply."""
        ...

    def encode(self, tensors: Tensors, context: CodecContext) -> tuple[Rows, bytes]:
        """Return rows, which may be views of the tensors, and side information."""
        ...

    def outline(self, spec: Spec, reader: Reader) -> tuple[Shapes, Any]:
        """Read the side information; return the shapes of the rows and what ``decode`` needs to know."""
        ...

    def decode(self, rows: Rows, plan: Any, spec: Spec) -> Tensors:
        """Invert ``encode``; float32 tensors."""
        ...


class Transform(Piece, Protocol):
    """Rows to rows; what it draws at random goes by its name."""

    name: ClassVar[str]

    def encode(self, rows: Rows, context: CodecContext) -> tuple[Rows, bytes]:
        """Return new rows and side information."""
        ...

    def outline(self, shapes: Shapes, reader: Reader, context: CodecContext) -> tuple[Shapes, Any]:
        """Read the side information; return the shapes of the new rows and what ``decode`` needs to know."""
        ...

    def decode(self, rows: Rows, plan: Any, shapes: Shapes, context: CodecContext) -> Rows:
        """Invert ``encode``; returns rows of ``shapes``."""
        ...


class Coder(Protocol):
    """Codes to bytes, lossless."""

    def encode(self, codes: Codes, alphabet: int) -> Sequence[Buffer]:
        """Return bytes for codes in [0, alphabet)."""
        ...

    def decode(self, reader: Reader, count: int, alphabet: int) -> Codes:
        """Return ``count`` codes in [0, alphabet)."""
        ...


class Quantizer(Piece, Protocol):
    """Rows to codes."""

    def encode(self, rows: Rows, coder: Coder, context: CodecContext) -> Sequence[Buffer]:
        """Return scales and coded values."""
        ...

    def decode(self, reader: Reader, shapes: Shapes, coder: Coder, context: CodecContext) -> Rows:
        """Invert ``encode``; returns rows of ``shapes``."""
        ...


@dataclass(frozen=True)
class Chain(FramedCodec):
    """One chain. Build it with :func:`fedllm.codecs.compose.chain` or :func:`fedllm.codecs.parse`.

    A body that would be larger than the uncompressed tensors is replaced by those, in their own dtype; so are
    factors so coarse that their product is farther from the tensors than zero is.
    """

    layout: Layout
    transforms: tuple[Transform, ...]
    quantizer: Quantizer
    coder: Coder
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def _pieces(self) -> tuple[Piece, ...]:
        return (self.layout, *self.transforms, self.quantizer)

    @property
    def linear(self) -> bool:
        """All pieces are."""
        return all(piece.linear for piece in self._pieces)

    @property
    def unbiased(self) -> bool:
        """All pieces are."""
        return all(piece.unbiased for piece in self._pieces)

    @property
    def contractive(self) -> bool:
        """All pieces are."""
        return all(piece.contractive for piece in self._pieces)

    @property
    def grid(self) -> tuple[int, int] | None:
        """That of a quantizer which takes the values as they are, with no coder after it."""
        return getattr(self.quantizer, "grid", None) if "|" not in self.text else None

    def contracted(self) -> Chain:
        """Return the chain of its pieces' smallest-error variants."""
        transforms = tuple(transform.contracted() for transform in self.transforms)
        return replace(
            self,
            layout=self.layout.contracted(),
            transforms=transforms,
            quantizer=self.quantizer.contracted(),
        )

    def write(
        self, tensors: Tensors, state: Tensors, context: CodecContext
    ) -> tuple[Sequence[Buffer], Tensors]:
        """Return the body: one byte that says whether it is coded, side information, scales and codes."""
        size = dense_bytes(spec_of(tensors))
        if not size:
            return [b"\0"], state
        parts = self._body(tensors, context)
        return ([b"\0", pack(tensors)] if self._futile(tensors, parts, context) else parts), state

    def _body(self, tensors: Tensors, context: CodecContext) -> list[Buffer]:
        rows, side = self.layout.encode(tensors, context)
        sides = [side]
        for transform, own in self._steps(context):
            rows, side = transform.encode(rows, own)
            sides.append(side)
        return [b"\1", *sides, *self.quantizer.encode(rows, self.coder, context)]

    def _futile(self, tensors: Tensors, parts: Sequence[Buffer], context: CodecContext) -> str:
        """Say why a body is not worth sending in place of the values; empty where it is."""
        if sum(memoryview(part).nbytes for part in parts) > dense_bytes(spec_of(tensors)) + 1:
            return "it makes them no smaller"
        if not self.layout.multiplies:
            return ""
        decoded, _ = self.read(Reader(b"".join(parts)), spec_of(tensors), {}, context)
        gap = sum(float((t.double() - decoded[n].double()).square().sum()) for n, t in tensors.items())
        if gap <= sum(float(t.double().square().sum()) for t in tensors.values()):
            return ""
        return "errors of two factors multiply, and leave of them what is farther off than nothing is"

    def misfit(self, spec: Spec) -> str:
        """Say where such messages would go uncompressed, or its layout would leave each tensor as it is.

        Tried on one tensor of every shape, matrices of rank one, at both ends of the run's schedules: what
        does nothing there has nothing to do.
        """
        trial = _simple(spec)
        if not trial:
            return ""
        with np.errstate(all="ignore"):
            return self._idle(trial, progress=0.0) and self._idle(trial, progress=1.0)

    def _idle(self, tensors: Tensors, progress: float) -> str:
        context = CodecContext(path=("rehearsal",), progress=progress)
        rows, _ = self.layout.encode(tensors, context)
        unfactored = sum(row.size for row in rows) == sum(tensor.numel() for tensor in tensors.values())
        if self.layout.multiplies and unfactored:
            name, largest = max(tensors.items(), key=lambda item: item[1].numel())
            return f"{spell(self.layout)} leaves each tensor as it is, even {name} {list(largest.shape)}"
        why = self._futile(tensors, self._body(tensors, context), context)
        return f"updates would go uncompressed, since {why}" if why else ""

    def read(
        self, reader: Reader, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """Read what :meth:`write` returned."""
        coded = reader.take(1, "header")[0]
        if coded > 1:
            raise CodecError(f"payload is neither dense nor coded: its first byte is {coded}")
        size = dense_bytes(spec)
        if not coded:
            return unpack(reader.take(size, "dense"), spec), state
        if not size:
            raise CodecError("payload is coded, but there is nothing to decode")
        shapes, layout_plan = self.layout.outline(spec, reader)
        steps = []
        for transform, own in self._steps(context):
            inner, plan = transform.outline(shapes, reader, own)
            steps.append((transform, own, plan, shapes))
            shapes = inner
        rows = self.quantizer.decode(reader, shapes, self.coder, context)
        for transform, own, plan, outer in reversed(steps):
            rows = transform.decode(rows, plan, outer, own)
        tensors = self.layout.decode(rows, layout_plan, spec)
        return {name: tensor.to(spec[name].dtype) for name, tensor in tensors.items()}, state

    def _steps(self, context: CodecContext) -> Iterator[tuple[Transform, CodecContext]]:
        """Give transforms that come again random numbers of their own: two that draw alike lean alike."""
        seen: Counter[str] = Counter()
        for transform in self.transforms:
            again = seen[transform.name]
            seen[transform.name] += 1
            yield transform, replace(context, path=(*context.path, again)) if again else context


def _simple(spec: Spec) -> Tensors:
    """Return an update of one tensor of every shape, matrices of rank one, values of about one magnitude."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        sign = torch.randint(2, shape, generator=random) * 2 - 1
        return sign * (0.5 + torch.rand(shape, generator=random))

    found: Tensors = {}
    one_each = {item: name for name, item in sorted(spec.items(), reverse=True) if item.numel}
    for item, name in one_each.items():
        height = item.shape[0] if len(item.shape) > 1 else 1
        values = draw(height, 1) * draw(1, item.numel // height) * 1e-3
        found[name] = values.reshape(item.shape).to(item.dtype)
    return found


def generator(context: CodecContext, purpose: str) -> np.random.Generator:
    """Return the generator that sender and receiver of one message share for one purpose."""
    return stream(context.seed, *context.path, purpose)


def cut(values: Array, shapes: Shapes) -> Rows:
    """View one long vector as rows of ``shapes``."""
    ends = np.cumsum([height * width for height, width in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes, strict=True)]


def raw_words(random: np.random.Generator, count: int) -> npt.NDArray[np.uint64]:
    """Return uniform 64-bit words; unlike numpy's distributions, they are the same in all its releases."""
    return np.asarray(random.bit_generator.random_raw(count), "<u8")


def spell(stage: Any) -> str:
    """Write a stage the way the parser reads it; fields declared with ``repr=False`` are not spelled.

    >>> from fedllm.codecs.stages.quantize import Quantize
    >>> spell(Quantize(bits=4))
    'quantize(bits=4, block=4096, stochastic=false)'
    """
    values = {field.name: getattr(stage, field.name) for field in fields(stage) if field.repr}
    inside = ", ".join(f"{key}={_literal(value)}" for key, value in values.items() if value is not None)
    return f"{stage.name}({inside})" if inside else str(stage.name)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
