"""Different codecs for different tensors of one message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from fedllm.codecs.base import Buffer, CodecContext, Dense, FramedCodec, Reader
from fedllm.errors import ConfigError
from fedllm.tensors import Spec, Tensors, spec_of

__all__ = ["PerTensor"]


@dataclass(frozen=True)
class PerTensor(FramedCodec):
    """``per_tensor``: matrices one way, vectors another, and tensors picked by name a third.

    A tensor takes the first route that fits it. ``matrices`` are tensors of two axes or more, ``vectors`` the
    rest; a route left out is ``none``. Any other key is a pattern of names, as in
    ``per_tensor("*classifier*"=none, matrices=low_rank(rank=4), vectors=quantize(bits=8))``; one that fits no
    tensor of a run is an error before the run, for a misspelt pattern would compress nothing and tell nobody.

    Attributes:
        routes: pairs of a key and the codec of the tensors that it fits.
    """

    routes: tuple[tuple[str, FramedCodec], ...]

    name: ClassVar[str] = "per_tensor"
    example: ClassVar[str] = "per_tensor(matrices=low_rank(rank=4), vectors=quantize(bits=8))"
    rate: ClassVar[str] = "of the routes"
    cost: ClassVar[str] = "of the routes"

    @classmethod
    def from_arguments(
        cls, arguments: Sequence[tuple[str | None, Any]], build: Callable[[Any], FramedCodec]
    ) -> PerTensor:
        """Build from what the parser read."""
        routes = []
        for key, value in arguments:
            if key is None or not isinstance(value, list):
                raise ConfigError('per_tensor takes routes such as matrices=..., vectors=... or "*bias*"=...')
            routes.append((key, build(value)))
        if len(dict(routes)) < len(routes) or not routes:
            raise ConfigError("per_tensor takes at least one route, and each key once")
        return cls(tuple(routes))

    def __str__(self) -> str:
        routes = (
            f"{key if key in _KINDS else chr(34) + key + chr(34)}={codec}" for key, codec in self.routes
        )
        return f"{self.name}({', '.join(routes)})"

    @property
    def linear(self) -> bool:
        """All routes are."""
        return all(codec.linear for _, codec in self.routes)

    @property
    def unbiased(self) -> bool:
        """All routes are."""
        return all(codec.unbiased for _, codec in self.routes)

    @property
    def contractive(self) -> bool:
        """All routes are."""
        return all(codec.contractive for _, codec in self.routes)

    @property
    def stateful(self) -> bool:
        """Any route is."""
        return any(codec.stateful for _, codec in self.routes)

    def contracted(self) -> PerTensor:
        """Return the routes' smallest-error variants."""
        return PerTensor(tuple((key, codec.contracted()) for key, codec in self.routes))

    def misfit(self, spec: Spec) -> str:
        """Name the first pattern that fits no tensor which no route before it has taken."""
        left = dict(spec)
        for key, codec in self.routes:
            taken = {name: item for name, item in left.items() if _fits(key, name, len(item.shape))}
            if not taken and key not in _KINDS:
                some = ", ".join(sorted(spec)[:3]) + (", ..." if len(spec) > 3 else "")
                return f"no tensor is left that fits {key!r}; updates hold {some}"
            if wrong := codec.misfit(taken):
                return wrong
            left = {name: item for name, item in left.items() if name not in taken}
        return ""

    def write(
        self, tensors: Tensors, state: Tensors, context: CodecContext
    ) -> tuple[Sequence[Buffer], Tensors]:
        """Return the bodies of all routes, and their states together."""
        parts: list[Buffer] = []
        after: Tensors = {}
        for key, codec, names in self._split(spec_of(tensors)):
            body, own = codec.write(
                {name: tensors[name] for name in names}, _only(state, names), _context(context, key)
            )
            parts.extend(body)
            after.update(own)
        return parts, after

    def read(
        self, reader: Reader, spec: Spec, state: Tensors, context: CodecContext
    ) -> tuple[Tensors, Tensors]:
        """Read the bodies of all routes."""
        tensors: Tensors = {}
        after: Tensors = {}
        for key, codec, names in self._split(spec):
            decoded, own = codec.read(
                reader, {name: spec[name] for name in names}, _only(state, names), _context(context, key)
            )
            tensors.update(decoded)
            after.update(own)
        return tensors, after

    def _split(self, spec: Spec) -> Iterator[tuple[str, FramedCodec, list[str]]]:
        left = sorted(spec)
        for key, codec in (*self.routes, *((kind, Dense()) for kind in _KINDS)):
            names = [name for name in left if _fits(key, name, len(spec[name].shape))]
            left = [name for name in left if name not in set(names)]
            if names:
                yield key, codec, names


STAGES = (PerTensor,)

_KINDS = ("matrices", "vectors")


def _fits(key: str, name: str, axes: int) -> bool:
    if key in _KINDS:
        return (axes > 1) == (key == "matrices")
    return fnmatchcase(name, key)


def _only(state: Tensors, names: list[str]) -> Tensors:
    return {name: state[name] for name in names if name in state}


def _context(context: CodecContext, key: str) -> CodecContext:
    """Give each route random numbers of its own."""
    return replace(context, path=(*context.path, key))
