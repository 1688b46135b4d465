"""``{here}``: paths that are told from where they are written, so that a folder may move with what it holds.

In a configuration file it is the folder of that file, in what a run keeps of its configuration the run's
folder. A :class:`~fedllm.config.RunConfig` in use holds the paths themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig

__all__ = ["HERE", "held", "located", "located_document", "portable"]

HERE = "{here}"
"""Stands at the beginning of a path."""

_KEYS = {"model": ("name",), "data": ("path", "test_path")}
"""Settings that may name a place."""


def located(config: RunConfig, folder: Path) -> RunConfig:
    """Return a configuration in which ``{here}`` is ``folder``.

    >>> config = RunConfig.model_validate({"data": {"path": "{here}/texts.jsonl"}})
    >>> located(config, Path("/runs/x")).data.path
    '/runs/x/texts.jsonl'
    """
    return _changed(config, lambda path: _located(path, folder))


def portable(config: RunConfig, folder: Path) -> RunConfig:
    """Return a configuration in which what lies in ``folder`` is told from there; inverts :func:`located`.

    >>> config = RunConfig.model_validate({"data": {"path": "/runs/x/texts.jsonl"}})
    >>> portable(config, Path("/runs/x")).data.path
    '{here}/texts.jsonl'
    """
    return _changed(config, lambda path: _portable(path, folder))


def located_document(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a parsed configuration file, not yet validated, in which ``{here}`` is ``folder``."""
    found = dict(document)
    for section, keys in _KEYS.items():
        if isinstance(values := found.get(section), Mapping):
            named = {key: values[key] for key in keys if isinstance(values.get(key), str)}
            found[section] = {**values, **{key: _located(path, folder) for key, path in named.items()}}
    for key in ("init_from", "extends"):
        if isinstance(source := found.get(key), str):
            found[key] = _located(source, folder)
    return found


def held(config: RunConfig, folder: Path) -> set[str]:
    """Return the names in ``folder`` that a configuration needs: of files and folders directly below it.

    >>> config = RunConfig.model_validate({"data": {"path": "/runs/x/given/texts.jsonl"}})
    >>> held(config, Path("/runs/x"))
    {'given'}
    """
    names: set[str] = set()

    def note(path: str) -> str:
        told = _portable(path, folder)
        if told != path:
            names.add(Path(told).parts[1])
        return path

    _changed(config, note)
    return names


def _changed(config: RunConfig, change: Callable[[str], str]) -> RunConfig:
    sections = {}
    for section, keys in _KEYS.items():
        values = getattr(config, section)
        named = {key: path for key in keys if (path := getattr(values, key)) is not None}
        if updated := {key: to for key, path in named.items() if (to := change(path)) != path}:
            sections[section] = values.model_copy(update=updated)
    return config.model_copy(update=sections) if sections else config


def _located(path: str, folder: Path) -> str:
    return str(folder.resolve() / path[len(HERE) + 1 :]) if path.startswith(f"{HERE}/") else path


def _portable(path: str, folder: Path) -> str:
    place, root = Path(path), folder.resolve()
    below = place.is_absolute() and place != root and place.is_relative_to(root)
    return f"{HERE}/{place.relative_to(root).as_posix()}" if below else path
