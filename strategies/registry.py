"""Finds the methods: every module of this package that names a ``METHOD``.

Names are known without importing anything, so that the command line stays quick; a method's module, and
torch with it, is imported only once the method is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from fedllm.config import RunConfig, resolve
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from strategies.base import Method

__all__ = ["load_method", "method_names", "method_options", "resolve_run"]


def method_names() -> list[str]:
    """Return the names of all methods, which are their modules' names.

    >>> "lora" in method_names()
    True
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return [path.stem for path in sources if "\nMETHOD = " in path.read_text(encoding="utf-8")]


def load_method(name: str) -> type[Method]:
    """Import a method by name."""
    if name not in method_names():
        raise ConfigError(f"method = {name!r} is unknown; valid are {', '.join(method_names())}")
    method: type[Method] = import_module(f"strategies.{name}").METHOD
    return method


def method_options(name: str) -> type[BaseModel]:
    """Return the options model of a method, for :func:`fedllm.config.resolve`."""
    return load_method(name).Options


def resolve_run(document: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Resolve a configuration and let its method and codecs object to combinations only they can judge.

    Raises:
        ConfigError: names what was given and what is allowed.
    """
    from fedllm.codecs import parse

    config = resolve(document, overrides, methods=method_names(), options=method_options)
    load_method(config.method)(config)
    parse(config.codec.up)
    if "ef21" in str(parse(config.codec.down)):
        raise ConfigError(
            f'codec.down = "{config.codec.down}": ef21 needs an estimate that a client which was not asked '
            "for a while does not have; use error_feedback"
        )
    return config
