"""The presets: configurations that show something, with what they cost."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config import read_toml
from fedllm.errors import ConfigError

__all__ = ["Preset", "document", "presets"]

_FOLDER = Path(__file__).parent / "presets"


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


def presets() -> list[Preset]:
    """Return all presets, by name.

    >>> "quickstart" in [preset.name for preset in presets()]
    True
    """
    return [_read(path) for path in sorted(_FOLDER.glob("*.toml"))]


def _read(path: Path) -> Preset:
    text = path.read_text(encoding="utf-8")
    comments = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    costs = next((line for line in comments if line.startswith("Costs:")), "")
    return Preset(path.stem, comments[0], costs.removeprefix("Costs:").strip(), tomllib.loads(text))


def document(source: str) -> dict[str, Any]:
    """Return the settings of a preset or of a TOML file; a file without a name is called after itself.

    Settings may start from a preset, which they name under ``extends``, and say only what differs.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(source)
    if path.suffix == ".toml" or path.is_file():
        settings = {"name": path.stem, **read_toml(path)}
    else:
        settings = {"name": source, **_named(source).settings}
    base = settings.pop("extends", None)
    return settings if base is None else _merge(document(str(base)), settings)


def _named(name: str) -> Preset:
    found = {preset.name: preset for preset in presets()}
    if name not in found:
        raise ConfigError(f"{name!r} is neither a TOML file nor a preset; presets are {', '.join(found)}")
    return found[name]


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
