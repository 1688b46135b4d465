"""The presets: configurations that show something, with what they cost."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config import as_name, read_toml
from fedllm.errors import ConfigError
from fedllm.here import located_document

__all__ = ["Cost", "Preset", "document", "origin", "presets"]

_FOLDER = Path(__file__).parent


_COSTS = re.compile(
    r"(?:(?P<minutes>\d+) min)? ?(?:(?P<seconds>\d+) s)?, "
    r"(?P<memory>[\d.]+) GB of memory, (?P<disk>[\d.]+) MB of disk on one core"
)


@dataclass(frozen=True)
class Cost:
    """What a run took on one core: seconds, the peak of memory in bytes, bytes of its folder."""

    seconds: float
    memory: float
    disk: float


@dataclass(frozen=True)
class Preset:
    """A configuration file of the package.

    Attributes:
        name: as the command line takes it.
        shows: what it is for: the first comment of its file.
        costs: what it takes: the comment that starts with "Costs:".
        settings: the file's content.
    """

    name: str
    shows: str
    costs: str
    settings: dict[str, Any]

    @property
    def cost(self) -> Cost | None:
        """``costs`` as numbers, or None where nothing was measured."""
        found = _COSTS.match(self.costs)
        if found is None:
            return None
        told = {name: float(value or 0) for name, value in found.groupdict().items()}
        return Cost(60 * told["minutes"] + told["seconds"], 1e9 * told["memory"], 1e6 * told["disk"])


def presets() -> list[Preset]:
    """Return all presets, by name.

    >>> "quickstart" in [preset.name for preset in presets()]
    True
    """
    return [_read(path) for path in _files()]


def _files() -> list[Path]:
    return sorted(_FOLDER.glob("*.toml"))


def _read(path: Path) -> Preset:
    text = path.read_text(encoding="utf-8")
    comments = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    costs = next((line for line in comments if line.startswith("Costs:")), "")
    return Preset(path.stem, comments[0], costs.removeprefix("Costs:").strip(), tomllib.loads(text))


def document(source: str, plugins: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the settings of a preset or of a TOML file; a file without a name is called after itself.

    Settings may start from a preset, which they name under ``extends``, and say only what differs. Further
    ``plugins`` are added to those that the settings name. A path that begins with ``{here}/`` is told from
    the file's own folder.

    Raises:
        ConfigError: there is neither, or files extend each other.
    """
    settings: dict[str, Any] = {}
    for _, said in _sources(source):
        settings = _merge(settings, said)
    if plugins:
        settings["plugins"] = [*settings.get("plugins", ()), *plugins]
    return settings


def origin(source: str) -> str:
    """Return the preset that :func:`document` starts from, or the file itself where it names none."""
    for name, _ in reversed(_sources(source)):
        source = name
        if not _is_file(name):
            break
    return source


def _is_file(source: str) -> bool:
    return Path(source).suffix == ".toml" or Path(source).is_file()


def _sources(source: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a preset or file with what it says, and before it each that it extends.

    Raises:
        ConfigError: one is not there, or extends what extends it.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    while True:
        if _is_file(source):
            path = Path(source)
            settings = {"name": as_name(path.stem), **located_document(read_toml(path), path.parent)}
        else:
            settings = {"name": source, **_named(source).settings}
        base = settings.pop("extends", None)
        found.insert(0, (source, settings))
        if base is None:
            return found
        if not isinstance(base, str):
            raise ConfigError(f"{source}: extends = {base!r} is no preset and no file; it takes one name")
        if base in (one for one, _ in found):
            raise ConfigError(f"{source}: extends = {base!r} leads back to itself; leave it out of one file")
        source = str(base)


def _named(name: str) -> Preset:
    files = {path.stem: path for path in _files()}
    if name not in files:
        raise ConfigError(f"{name!r} is neither a TOML file nor a preset; presets are {', '.join(files)}")
    return _read(files[name])


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes``, sections merged key by key.

    >>> _merge({"codec": {"up": "none"}, "seed": 0}, {"codec": {"down": "none"}})
    {'codec': {'up': 'none', 'down': 'none'}, 'seed': 0}
    """
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
