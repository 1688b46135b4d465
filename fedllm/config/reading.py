"""TOML files, ``--set`` and ``--rounds`` read, and a document resolved to a configuration."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedllm.config.data import DataConfig
from fedllm.config.method import MethodOptions
from fedllm.config.mistakes import explain
from fedllm.config.run import RunConfig
from fedllm.errors import ConfigError
from fedllm.wording import suggest

Override = str | tuple[Sequence[str], Any]
"""A setting that replaces one of a file: as the command line has it, or as its key's parts and its value."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file; a syntax error names the file and the place."""
    try:
        # Some editors put a mark in front of UTF-8, which is no part of the text.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8, as TOML has to be: byte {error.start} is "
            f"0x{error.object[error.start]:02x}; save it in that encoding"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=value``; the value is read as TOML, and as plain text where that fails.

    >>> parse_override("training.learning_rate=1e-3")
    (['training', 'learning_rate'], 0.001)
    >>> parse_override("codec.up=quantize(bits=8)")
    (['codec', 'up'], 'quantize(bits=8)')
    """
    key, separator, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not separator or not all(path):
        raise ConfigError(f"--set takes key=value, as in training.local_steps=4; got {text!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"--set {text!a} is not UTF-8 text; rename the file or folder it names")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value.strip()


def read_override(override: Override) -> tuple[str, Sequence[str], Any]:
    """Return what an override is called in messages, its key's parts and its value as TOML has it."""
    if isinstance(override, str):
        return (f"--set {override}", *parse_override(override))
    path, value = override
    return ".".join(path), path, json.loads(json.dumps(value, default=str))


def total_rounds(text: str, done: int) -> int:
    """Read ``--rounds``: so many more than ``done``, or so many in all.

    >>> total_rounds("+5", 8), total_rounds("20", 8)
    (13, 20)
    """
    if not re.fullmatch(r"\+?[0-9]{1,9}", text):
        raise ConfigError(f"--rounds takes +N, so many more, or N, so many in all; got {text!r}")
    return done + int(text) if text.startswith("+") else int(text)


def resolve(
    document: Mapping[str, Any],
    overrides: Iterable[Override],
    *,
    methods: Iterable[str],
    options: Callable[[str], type[MethodOptions]],
) -> RunConfig:
    """Merge a document with ``--set`` overrides and validate the whole.

    Args:
        document: parsed TOML.
        overrides: ``a.b=value`` strings, or a key's parts with its value; later ones win.
        methods: names of the known methods; sections of those not chosen are checked and left out, so that
            a file can serve several methods, but an override for one of them is refused.
        options: returns the options model of a method.

    Raises:
        ConfigError: names the key, what was given and what is allowed.
    """
    tree: dict[str, Any] = json.loads(json.dumps(document, default=str))
    given = [read_override(override) for override in overrides]
    for said, path, value in given:
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"{said}: {part} is a value, not a section")
        branch[path[-1]] = value
    _require_one_source(document, [(path, value) for _, path, value in given])
    data = tree.get("data")
    if isinstance(data, dict) and data.get("path") is not None:
        data.pop("name", None)
    known = sorted(methods)
    method = tree.get("method", RunConfig.model_fields["method"].default)
    if method not in known:
        raise ConfigError(f"method = {method!r} is unknown{suggest(str(method), known)}")
    if "options" in tree:
        raise ConfigError(f"unknown key options: options of {method} belong in section [{method}]")
    sections = {name: tree.pop(name) for name in known if name in tree}
    checked = {name: _section(name, content, options) for name, content in sections.items()}
    for said, (section, *_), _ in given:
        if section in checked and section != method:
            raise ConfigError(f"{said} is for method = {section!r}, and this run's is {method!r}")
    tree["options"] = checked[method] if method in checked else _section(method, {}, options)
    return RunConfig.validated(tree)


def _require_one_source(document: Mapping[str, Any], given: Iterable[tuple[Sequence[str], Any]]) -> None:
    """Refuse ``data.name`` beside ``data.path`` where nothing says which of the two was meant.

    A path that overrides a file's or preset's name is meant; so is a path beside the default name, which
    resolved configurations write down.
    """
    section = document.get("data")
    written = section if isinstance(section, Mapping) else {}
    own: dict[str, Any] = {}
    for key, value in given:
        if key[0] == "data":
            own |= {key[1]: value} if key[1:] else value if isinstance(value, Mapping) else {}
    own_path, own_name = own.get("path"), own.get("name")
    path = own["path"] if "path" in own else written.get("path")
    default = DataConfig.model_fields["name"].default
    name = written.get("name", default) if own_name is None else own_name
    if path is not None and (own_name is not None or (own_path is None and name != default)):
        raise ConfigError(
            f"data.name = {name!r} and data.path = {path!r} both say where the texts are; leave one of them "
            "out"
        )


def _section(method: str, content: Any, options: Callable[[str], type[BaseModel]]) -> dict[str, Any]:
    schema = options(method)
    try:
        return schema.model_validate(content).model_dump(mode="json", exclude_none=True)
    except ValidationError as error:
        raise ConfigError(explain(error, schema, prefix=(method,))) from error
