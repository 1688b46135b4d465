"""The dashboard beside a simulation takes a port that is free, or says which is not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations import run_commands as commands
from tests.commands.conftest import Fedllm
from tests.reports.made_up import make_run


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_another_port_is_taken_where_somebody_listens(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "DASHBOARD_PORT", taken)
    port = commands._dashboard_port(None)
    assert port not in (0, taken)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_the_usual_port_is_taken_where_it_is_free(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free = commands._dashboard_port(None)
    monkeypatch.setattr(commands, "DASHBOARD_PORT", free)
    assert commands._dashboard_port(None) == free


def test_a_wanted_port_that_is_taken_is_one_sentence_and_nothing_is_overwritten(
    fedllm: Fedllm, tmp_path: Path, taken: int
) -> None:
    make_run(tmp_path / "run")
    words = ["simulate", "--out", tmp_path / "run", "--overwrite", "--dashboard-port", taken]
    answer = fedllm(*words)
    assert answer.code == 2
    assert answer.err.startswith(f"error: cannot listen on 127.0.0.1 port {taken}: ")
    assert answer.err.endswith("choose another --dashboard-port\n")
    assert (tmp_path / "run" / "run.db").is_file()
