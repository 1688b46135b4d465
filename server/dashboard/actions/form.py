"""The form for a new run, made from the configuration's own schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.data.starting_point import SETTINGS
from fedllm.errors import ConfigError

__all__ = ["Field", "fields", "parse"]

Kind = Literal["switch", "choice", "whole", "number", "words", "text"]


_ELSEWHERE = ("name", "method", "options")
"""Asked for beside the form, given by what one starts from, and found in the method's own section."""


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        key: as ``--set`` takes it, such as ``training.local_steps``.
        section: its part before the last dot; empty for the run's own settings.
        kind: how it is asked for; ``words`` is a list, written with commas.
        value: as it stands; None is unset.
        choices: of a ``choice``.
        says: what it means.
    """

    key: str
    section: str
    kind: Kind
    value: Any
    choices: tuple[str, ...] = ()
    says: str = ""

    @property
    def label(self) -> str:
        """Its last part, in words.

        >>> Field("training.local_steps", "training", "whole", 4).label
        'local steps'
        """
        return self.key.rpartition(".")[2].replace("_", " ")


def fields(schemas: Mapping[str, Any], document: Mapping[str, Any]) -> list[Field]:
    """Return all settings of a run, in the order of the schema, with their values in ``document``.

    Args:
        schemas: as :meth:`server.dashboard.actions.launch.Launcher.schemas` returns them.
        document: a checked configuration, as its TOML lays it out; what it lacks has its default, or is left
            open where it is chosen from the texts.
    """
    whole = schemas["run"]
    found: list[Field] = []
    for name, rule in whole["properties"].items():
        section = rule.get("$ref", "").rpartition("/")[2]
        if section:
            found += _section(name, whole["$defs"][section], document.get(name, {}))
        elif name not in _ELSEWHERE:
            found += _field(name, "", rule, document)
    method = str(document.get("method", ""))
    if method in schemas["methods"]:
        found += _section(method, schemas["methods"][method], document.get(method, {}))
    return found


def _section(name: str, schema: Mapping[str, Any], values: Mapping[str, Any]) -> list[Field]:
    return [field for key, rule in schema["properties"].items() for field in _field(key, name, rule, values)]


def _field(key: str, section: str, rule: Mapping[str, Any], values: Mapping[str, Any]) -> list[Field]:
    """Return the setting, or nothing where it is none that a form could ask for."""
    variants = [variant for variant in rule.get("anyOf", [rule]) if variant.get("type") != "null"]
    kind = _kind(variants[0])
    if kind is None:
        return []
    path = f"{section}.{key}" if section else key
    choices = tuple(variants[0].get("enum", ()))
    says = str(rule.get("description", "")).replace("``", "")
    value = values.get(key, rule.get("default"))
    if kind == "choice" and not isinstance(value, str):
        return []  # numbers in the place of a choice
    if path in SETTINGS and key not in values:
        value, says = None, f"{says} Left open: chosen from one's own texts; else {rule['default']}."
    return [Field(path, section, kind, value, choices, says)]


def _kind(rule: Mapping[str, Any]) -> Kind | None:
    if "enum" in rule:
        return "choice"
    if rule.get("type") == "array":
        plain = rule.get("items", {}).get("type") == "string"
        return "words" if plain else None
    kinds: dict[str, Kind] = {"boolean": "switch", "integer": "whole", "number": "number", "string": "text"}
    return kinds.get(str(rule.get("type")))


def parse(field: Field, given: Any) -> Any:
    """Return what was entered as the configuration takes it; None where the field was left as it is.

    Raises:
        ConfigError: names the setting and what it takes.
    """
    if field.kind == "words":
        given = [word.strip() for word in str(given or "").split(",") if word.strip()]
        return None if given == list(field.value or []) else given
    if given is None or given == "" or given == field.value:
        return None
    if field.kind in ("whole", "number"):
        try:
            number = float(given)
        except ValueError:
            raise ConfigError(f"{field.key} = {given!r} is not a number") from None
        if field.kind == "whole" and not number.is_integer():
            raise ConfigError(f"{field.key} = {given!r} is not a whole number")
        value = int(number) if field.kind == "whole" else number
        return None if value == field.value else value
    return given
