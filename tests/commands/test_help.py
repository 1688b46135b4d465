"""Every command says what it takes, once."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer

from fedllm import cli
from simulations.bench import BENCHMARKS
from tests.commands.conftest import Fedllm

ROOT = typer.main.get_command(cli.app)


def commands() -> dict[str, click.Command]:
    assert isinstance(ROOT, click.Group)
    return ROOT.commands


def parameters() -> Iterator[tuple[str, click.Parameter]]:
    for name, command in commands().items():
        yield from ((name, parameter) for parameter in command.params)


def words(text: str) -> str:
    """The text without the frame that help is laid out in."""
    return " ".join(word for word in text.split() if word.strip("│╭╮╰╯─"))


@pytest.mark.parametrize("name", commands())
def test_help_of_every_command_holds_what_is_said_of_it_and_of_each_parameter(
    fedllm: Fedllm, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    answer = fedllm(name, "--help")
    shown = words(answer.out)
    assert answer.code == 0
    assert words(str(commands()[name].help)).split("  ")[0] in shown
    for parameter in commands()[name].params:
        told = getattr(parameter, "help", None)
        assert told, f"fedllm {name}: {parameter.name} has no help"
        assert words(told) in shown
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in shown


@pytest.mark.parametrize("name", commands())
def test_every_command_answers_in_json(name: str) -> None:
    assert "--json" in [word for parameter in commands()[name].params for word in parameter.opts]


def test_a_near_miss_is_suggested_once(fedllm: Fedllm) -> None:
    answer = fedllm("bnch")
    assert answer.code == 2
    assert answer.err.count("Did you mean") == 1
    assert "'bench'" in answer.err


def test_completion_knows_the_commands(fedllm: Fedllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_FEDLLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fedllm re")
    monkeypatch.setenv("COMP_CWORD", "1")
    answer = fedllm()
    assert {"resume", "report", "reproduce"} == set(answer.out.split())


def test_every_benchmark_that_is_listed_runs_and_no_other(fedllm: Fedllm) -> None:
    from importlib import import_module
    from pkgutil import iter_modules

    from simulations import bench

    for name in BENCHMARKS:
        assert callable(import_module(f"simulations.bench.{name}").run)
    others = {module.name for module in iter_modules(bench.__path__) if not module.ispkg} - BENCHMARKS.keys()
    assert not any(hasattr(import_module(f"simulations.bench.{name}"), "run") for name in others)
    answer = fedllm("bench", "codec_fuzz")
    assert (answer.code, answer.err.startswith("error: there is no benchmark 'codec_fuzz'")) == (2, True)
