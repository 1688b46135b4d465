"""The command line in this process: arguments in, exit code, stdout and stderr out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import typer

from fedllm import cli


class Answer(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


Fedllm = Callable[..., Answer]


@cache
def whole() -> Any:
    """Every command, put together once: each process of a user does it for its one command."""
    return typer.main.get_command(cli.app)


@pytest.fixture
def fedllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedllm:
    command = whole()  # before it takes the place of what it is made from
    monkeypatch.setattr(cli, "app", command)

    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fedllm", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Answer(ended.value.code, out, err)

    return run
