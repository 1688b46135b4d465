"""The command line in this process: arguments in, exit code, stdout and stderr out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from fedllm import cli


class Answer(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


Fedllm = Callable[..., Answer]


@pytest.fixture
def fedllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fedllm:
    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fedllm", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Answer(ended.value.code, out, err)

    return run
