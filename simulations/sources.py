"""What a run is configured from: a preset, a file or a configuration, and what differs from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.presets import document, origin
from strategies.registry import resolve_run
from strategies.starting_point import usual_source

__all__ = ["Source", "chosen", "name_of", "resolved"]

Source = str | Path | RunConfig


def chosen(source: Source | None, *settings: Mapping[str, Any]) -> Source:
    """Return the source named, or the one that is usual with such settings."""
    return source or usual_source(pair for told in settings for pair in _flat(told))


def resolved(source: Source, *settings: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a source with settings changed.

    Raises:
        ConfigError: one is given twice, or they do not fit.
    """
    start = source.to_document(given=True) if isinstance(source, RunConfig) else document(str(source))
    changes: dict[tuple[str, ...], Any] = {}
    for key, value in (pair for told in settings for pair in _flat(told)):
        if key in changes:
            raise ConfigError(f"{'.'.join(key)} is given twice: give it once")
        changes[key] = value
    return resolve_run(start, changes.items())


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield settings by the parts of their keys, those of a section one by one."""
    for key, value in settings.items():
        parts = tuple(str(key).split("."))
        if isinstance(value, Mapping) and len(parts) == 1:
            yield from (((*parts, *str(name).split(".")), one) for name, one in value.items())
        else:
            yield parts, value


def name_of(source: Source) -> str:
    """Return what a source is called where the run is announced."""
    return source.name if isinstance(source, RunConfig) else origin(str(source))
