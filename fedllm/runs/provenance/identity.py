"""Which run this is: what its numbers come from, and what makes two runs the same run."""

from __future__ import annotations

import os
import platform
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, StoreError
from fedllm.here import located

__all__ = ["Difference", "difference", "provenance", "require_same", "require_unedited"]

_PACKAGES = ("fedllm", "flwr", "numpy", "peft", "torch", "transformers")


class Difference(NamedTuple):
    """The first setting in which two configurations differ, in the order of the configuration file."""

    key: str
    first: Any
    second: Any


def difference(first: RunConfig, second: RunConfig, *, ignoring: tuple[str, ...] = ()) -> Difference | None:
    """Return the first setting that differs, or None where both are the same run.

    Args:
        first: one configuration.
        second: the other.
        ignoring: keys that do not count, such as ``name``.

    >>> difference(RunConfig(), RunConfig.model_validate({"data": {"alpha": 0.1}}))
    Difference(key='data.alpha', first=0.5, second=0.1)
    >>> difference(RunConfig(name="a"), RunConfig(name="b"), ignoring=("name",)) is None
    True
    """
    left, right = dict(_settings(first.to_document())), dict(_settings(second.to_document()))
    for key in left | right:
        if key not in ignoring and left.get(key) != right.get(key):
            return Difference(key, left.get(key), right.get(key))
    return None


def _settings(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def require_same(folder: Path, stored: RunConfig, asked: RunConfig) -> None:
    """Refuse to take the run in a folder for one with another configuration.

    Raises:
        StoreError: names the first setting that differs, and what to do.
    """
    if differs := difference(stored, asked):
        raise StoreError(
            f"{folder} holds a run with {differs.key} = {_said(differs.first)}, asked was "
            f"{differs.key} = {_said(differs.second)}: choose another folder, or go on with that run "
            f"as it is: fedllm resume {folder}"
        )


def require_unedited(folder: Path, stored: RunConfig, extended: RunConfig | None = None) -> None:
    """Refuse a run whose ``config.toml`` no longer says what the run was begun with.

    A missing file says nothing: ``run.db`` holds the configuration as well.

    Args:
        folder: the run folder.
        stored: what it was begun with.
        extended: what it goes on with after its end; one killed as it took this up says so already.

    Raises:
        StoreError: names the first setting that differs, and what to do.
    """
    path = folder / "config.toml"
    try:
        told = located(RunConfig.from_document(tomllib.loads(path.read_text(encoding="utf-8"))), folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, ConfigError) as error:
        raise StoreError(f"{path} is not what the run was begun with: {error}; undo the edit") from error
    if extended is not None and difference(extended, told) is None:
        return
    if differs := difference(stored, told):
        raise StoreError(
            f"{path} says {differs.key} = {_said(differs.second)}, but the run was begun with "
            f"{differs.key} = {_said(differs.first)}: undo the edit, or start another run from the edited "
            f"file: fedllm simulate {path} --out NEW_FOLDER"
        )


def _said(value: Any) -> str:
    return "nothing" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


def provenance(**facts: Any) -> dict[str, Any]:
    """Return versions of what computes, the git commit of this checkout (None elsewhere) and further facts.

    >>> provenance(engine="loopback")["engine"]
    'loopback'
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    machine = {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    return {"versions": versions, "git": _git(Path(__file__).parent), "machine": machine, **facts}


def _git(folder: Path) -> dict[str, Any] | None:
    """Return the commit that holds this very file, and whether the checkout differs from it."""
    tracked = _run(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = _run(folder, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    return {"commit": commit, "modified": bool(_run(folder, "status", "--porcelain", "--untracked-files=no"))}


def _run(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
