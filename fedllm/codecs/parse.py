"""The text of a codec: ``"low_rank(energy=0.95) | quantize(bits=4) | entropy"``.

    codec = stage { "|" stage }
    stage = name [ "(" [ argument { "," argument } ] ")" ]
    argument = [ key "=" ] ( number | true | false | "text" | codec )

Every module of this package, and every plug-in, with a ``STAGES`` tuple of dataclasses adds to the words;
the fields of a dataclass are its stage's arguments.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, Self, get_args, get_type_hints

import fedllm.codecs
from fedllm import plugins
from fedllm.codecs.base import FramedCodec
from fedllm.codecs.compose import chain
from fedllm.config import CodecConfig
from fedllm.errors import ConfigError
from fedllm.wording import suggest

__all__ = ["Codecs", "Node", "parse", "vocabulary"]

_TOKEN = re.compile(
    r'\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|"(?P<text>[^"]*)"'
    r"|(?P<mark>[|(),=]))\s*"
)

Token = tuple[str, str]


@dataclass(frozen=True)
class Node:
    """One stage as it is written: a name and arguments, each with its key or without one."""

    name: str
    arguments: tuple[tuple[str | None, Any], ...] = ()


@dataclass(frozen=True)
class Codecs:
    """A run's codecs, read once; what they are spelled with is for people.

    Attributes:
        up: encodes what clients send.
        down: encodes what the server sends.
    """

    up: FramedCodec
    down: FramedCodec

    @classmethod
    def of(cls, config: CodecConfig) -> Self:
        """Parse both; raises as :func:`parse` does."""
        return cls(parse(config.up), parse(config.down))


def parse(text: str) -> FramedCodec:
    """Return the codec that ``text`` spells.

    >>> str(parse("quantize(8) | entropy"))
    'quantize(bits=8, block=4096, stochastic=false) | entropy'

    Raises:
        ConfigError: one sentence that says what is wrong and what would be right.
    """
    tokens = _tokens(text)
    nodes, rest = _codec(tokens, text)
    if rest[0] != ("end", ""):
        raise ConfigError(f"cannot read codec {text!r} from {rest[0][1]!r} on: stages are joined by |")
    return build(nodes)


def vocabulary() -> Mapping[str, type[Any]]:
    """Return every stage and combinator by name.

    Raises:
        ConfigError: a plug-in takes a name that is taken.
    """
    return {**_own(), **plugins.new("codec stage", _own(), plugins.stages())}


@cache
def _own() -> dict[str, type[Any]]:
    names = [item.name for item in pkgutil.walk_packages(fedllm.codecs.__path__, "fedllm.codecs.")]
    modules = map(importlib.import_module, names)
    return {stage.name: stage for module in modules for stage in getattr(module, "STAGES", ())}


def build(nodes: list[Node]) -> FramedCodec:
    """Turn parsed stages into a codec."""
    stages = [_stage(node) for node in nodes]
    if len(stages) == 1 and isinstance(stages[0], FramedCodec):
        return stages[0]
    return chain(*stages)


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise ConfigError(f"cannot read codec {text!r} from {text[position:]!r} on")
        kind = str(match.lastgroup)
        tokens.append((kind, match[kind]))
        position = match.end()
    return [*tokens, ("end", "")]


def _codec(tokens: list[Token], text: str) -> tuple[list[Node], list[Token]]:
    nodes = []
    while True:
        (kind, name), tokens = tokens[0], tokens[1:]
        if kind != "name":
            raise ConfigError(
                f"codec {text!r} lacks a stage's name {f'before {name!r}' if name else 'at its end'}"
            )
        arguments: list[tuple[str | None, Any]] = []
        if tokens[0] == ("mark", "("):
            arguments, tokens = _arguments(tokens[1:], text)
        nodes.append(Node(name, tuple(arguments)))
        if tokens[0] != ("mark", "|"):
            return nodes, tokens
        tokens = tokens[1:]


def _arguments(tokens: list[Token], text: str) -> tuple[list[tuple[str | None, Any]], list[Token]]:
    arguments: list[tuple[str | None, Any]] = []
    while tokens[0] != ("mark", ")"):
        key = None
        if tokens[0][0] in ("name", "text") and tokens[1] == ("mark", "="):
            key, tokens = tokens[0][1], tokens[2:]
        value, tokens = _value(tokens, text)
        arguments.append((key, value))
        if tokens[0] == ("mark", ","):
            tokens = tokens[1:]
        elif tokens[0] != ("mark", ")"):
            raise ConfigError(f"codec {text!r} lacks a comma or a closing parenthesis")
    return arguments, tokens[1:]


def _value(tokens: list[Token], text: str) -> tuple[Any, list[Token]]:
    kind, word = tokens[0]
    if kind == "number":
        number = float(word)
        return (int(number) if number.is_integer() and "." not in word else number), tokens[1:]
    if kind == "text":
        return word, tokens[1:]
    if word in ("true", "false"):
        return word == "true", tokens[1:]
    return _codec(tokens, text)


def _stage(node: Node) -> Any:
    known = vocabulary()
    if node.name not in known:
        raise ConfigError(f"unknown codec stage {node.name}{suggest(node.name, known)}")
    stage = known[node.name]
    if hasattr(stage, "from_arguments"):
        return stage.from_arguments(node.arguments, build)
    given = _bound(node, stage)
    lacking = [item.name for item in fields(stage) if item.default is MISSING and item.name not in given]
    if lacking:
        raise ConfigError(f"{node.name} needs {' and '.join(lacking)}")
    return stage(**given)


def _bound(node: Node, stage: type[Any]) -> dict[str, Any]:
    """Give every argument its key and the type that the dataclass declares."""
    allowed = [item.name for item in fields(stage) if item.repr]
    hints = get_type_hints(stage)
    given: dict[str, Any] = {}
    for position, (key, value) in enumerate(node.arguments):
        if key is None and position >= len(allowed):
            raise ConfigError(f"{node.name} takes at most {len(allowed)} arguments ({', '.join(allowed)})")
        name = allowed[position] if key is None else key
        if name not in allowed:
            raise ConfigError(f"{node.name} has no argument {name}{suggest(name, allowed)}")
        if name in given:
            raise ConfigError(f"{node.name} is given {name} twice")
        given[name] = _typed(f"{node.name}: {name}", value, hints[name])
    return given


def _typed(what: str, value: Any, hint: Any) -> Any:
    """Return ``value`` as ``hint`` says, or raise one sentence that says what it should be."""
    allowed = set(get_args(hint)) or {hint}
    if FramedCodec in allowed and isinstance(value, list):
        return build(value)
    if isinstance(value, list) and len(value) == 1 and not value[0].arguments:
        value = value[0].name  # a bare word, as in cast(bf16)
    if type(value) in allowed or (type(value) is int and float in allowed):
        return value
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        FramedCodec: "a codec",
    }
    wanted = " or ".join(text for kind, text in names.items() if kind in allowed)
    raise ConfigError(f"{what} takes {wanted}")
