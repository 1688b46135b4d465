"""What there is to choose from, for ``fedllm codecs`` and the documentation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from fedllm.codecs.parse import parse, vocabulary

__all__ = ["Entry", "catalogue"]


@dataclass(frozen=True)
class Entry:
    """One stage or combinator.

    Attributes:
        name: as the configuration spells it.
        summary: one sentence.
        example: a codec in which it stands; the properties are those of this codec.
        bits: bits per value on the wire.
        cost: arithmetic, n values.
        linear, unbiased, contractive, stateful: see :class:`fedllm.codecs.base.FramedCodec`.
    """

    name: str
    summary: str
    example: str
    bits: str
    cost: str
    linear: bool
    unbiased: bool
    contractive: bool
    stateful: bool


def catalogue() -> list[Entry]:
    """Return all entries, by name.

    >>> [entry.bits for entry in catalogue() if entry.name == "sign"]
    ['1 + 32/block']
    """
    return [_entry(name, stage) for name, stage in sorted(vocabulary().items())]


def _entry(name: str, stage: type[Any]) -> Entry:
    codec = parse(stage.example)
    first = (inspect.getdoc(stage) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")
    return Entry(
        name=name,
        summary=first.partition(": ")[2],
        example=stage.example,
        bits=stage.rate,
        cost=stage.cost,
        linear=codec.linear,
        unbiased=codec.unbiased,
        contractive=codec.contractive,
        stateful=codec.stateful,
    )
