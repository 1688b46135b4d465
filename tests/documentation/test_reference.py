"""What people can set, call or type says what it is, and stands in the reference."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import fedllm
from docs import hooks
from fedllm.cli import app
from simulations.keys import keys

ROOT = Path(__file__).parents[2]


def test_every_setting_stands_in_the_reference_with_its_meaning() -> None:
    page = hooks.settings()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| .* \| (.*) \|$", page, re.MULTILINE))
    assert rows.keys() == {key.name for key in keys()}
    assert [name for name, meaning in rows.items() if not meaning.strip().endswith(".")] == []


def public() -> Iterator[tuple[str, Any]]:
    """The front door, and what plug-ins build on."""
    modules = ["fedllm", "fedllm.errors", *(name for names in hooks.PLUG_INS.values() for name in names)]
    for module in modules:
        for name in importlib.import_module(module).__all__:
            yield f"{module}.{name}", getattr(importlib.import_module(module), name)


def undocumented(value: Any) -> Iterator[str]:
    """Yield "" where the thing itself says nothing, and the names of its own members that do not."""
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return
    doc = value.__doc__ or ""
    made_up = dataclasses.is_dataclass(value) and doc.startswith(f"{value.__name__}(")
    if not doc.strip() or made_up:
        yield ""
    if inspect.isclass(value):
        for name, member in vars(value).items():
            called = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
            if called and not name.startswith("_") and not inspect.getdoc(getattr(value, name)):
                yield f".{name}"


def test_every_public_name_says_what_it_is() -> None:
    assert [name + member for name, value in public() for member in undocumented(value)] == []


def test_every_public_name_stands_in_the_reference() -> None:
    pages = hooks.front_door() + hooks.plug_ins()
    headings = re.findall(r"heading: ([\w.]+)$", pages, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert {f"fedllm.{name}" for name in fedllm.__all__} <= set(headings)
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    assert [name for name, value in public() if hooks.home(name, value) not in shown] == []


def commands(group: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in getattr(group, "commands", {}).items():
        yield f"{path}{name}", command
        yield from commands(command, f"{path}{name} ")


def test_every_command_and_option_says_what_it_does() -> None:
    for name, command in commands(typer.main.get_command(app)):
        assert (command.help or "").strip().endswith("."), name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.slow
def test_every_command_and_option_stands_in_the_reference() -> None:
    page = hooks.commands()
    for name, command in commands(typer.main.get_command(app)):
        (section,) = re.findall(rf"^## `fedllm {name}`$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        for option in (text for one in command.params for text in one.opts if text.startswith("--")):
            assert f"`{option}" in section, f"{name} {option}"


def test_a_docstrings_examples_become_code_and_its_roles_names() -> None:
    text = "See :func:`~fedllm.codecs.parse`.\n\n    >>> parse(1)\n    'one'\n\n    Raises:\n        X: no.\n"
    assert hooks.markdown(inspect.cleandoc(text)) == (
        "See `fedllm.codecs.parse`.\n\n```pycon\n>>> parse(1)\n'one'\n```\n\nRaises:\n    X: no."
    )
