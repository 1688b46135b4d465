"""Every key of a configuration: what it takes, what it is when left out, what it means."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedllm.config import RunConfig
from strategies.registry import method_names, method_options

__all__ = ["Key", "keys", "markdown"]

_HEAD = "| key | takes | default | meaning |\n| --- | --- | --- | --- |\n"

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "table"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        name: as ``--set`` takes it; in TOML the part before the last dot is the section.
        takes: the kind of value, and its range.
        default: as TOML writes it, "" for unset.
        meaning: one sentence.
    """

    name: str
    takes: str
    default: str
    meaning: str


def keys() -> list[Key]:
    """Return all keys, those of the methods last.

    >>> [key.takes for key in keys() if key.name == "data.test_fraction"]
    ['number > 0, < 1']
    """
    found = [key for key in _keys(RunConfig, "") if key.name != "options"]
    for method in method_names():
        found += _keys(method_options(method), f"{method}.")
    return found


def _keys(schema: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            default = _toml(field.get_default(call_default_factory=True))
            yield Key(prefix + name, _takes(field), default, _said(field))


def _said(field: FieldInfo) -> str:
    return " ".join((field.description or "").replace("``", "`").split())


def _takes(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(one, name):g}"
        for one in field.metadata
        if isinstance(one, annotated_types.BaseMetadata)
        for name, sign in _BOUNDS.items()
        if hasattr(one, name)
    ]
    return " ".join([_kind(field.annotation), ", ".join(bounds)]).strip()


def _kind(annotation: Any) -> str:
    """Name a type as people do.

    >>> _kind(int | None), _kind(Literal["sgd", "adamw"]), _kind(tuple[str, ...]), _kind(tuple[int, int])
    ('integer', '"sgd" or "adamw"', 'list of text', '2 of integer')
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(one) for one in inner if one is not type(None))
    if origin is Annotated:
        return _kind(inner[0])
    if origin is tuple:
        return f"list of {_kind(inner[0])}" if Ellipsis in inner else f"{len(inner)} of {_kind(inner[0])}"
    return _WORDS[origin or annotation]


def _toml(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{}"
    return (
        f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def markdown() -> str:
    """Return all keys for a page of the documentation: a table for each section, those without one first."""
    found: dict[str, list[Key]] = {}
    for key in keys():
        found.setdefault(key.name.rpartition(".")[0], []).append(key)
    return "\n".join(_table(section, held) for section, held in found.items())


def _table(section: str, held: list[Key]) -> str:
    rows = "".join(
        f"| `{key.name}` | {_cell(key.takes)} | {_default(key.default)} | {_cell(key.meaning)} |\n"
        for key in held
    )
    return (f"## {section}\n\n" if section else "") + _HEAD + rows


def _default(text: str) -> str:
    return f"`{_cell(text)}`" if text else "unset"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
