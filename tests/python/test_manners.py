"""A run leaves a notebook as it found it: nothing of the process is changed, and it says what happens."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedllm
from fedllm.errors import FedllmError
from simulations.engines import loopback
from tests.parts import quick


def state() -> dict[str, Any]:
    """What belongs to the whole process, and to whoever wrote its program."""
    loggers = [logging.getLogger(name) for name in (None, *sorted(logging.root.manager.loggerDict))]
    return {
        "loggers": {log.name: (log.level, log.propagate, log.handlers[:], log.disabled) for log in loggers},
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": warnings.filters[:],
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled()),
        "place": os.getcwd(),
        "main": sys.modules["__main__"],
        "hooks": (sys.excepthook, sys.stdout, sys.stderr),
    }


def raising(error: BaseException) -> Any:
    def pull(*_: object) -> Any:
        raise error

    return pull


@pytest.mark.parametrize("error", quick([None, KeyboardInterrupt, FedllmError], KeyboardInterrupt))
def test_the_process_is_as_it_was(
    error: type[BaseException] | None,
    finished: fedllm.Run,
    small: dict[str, Any],
    rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything has been imported before; what libraries do when they are imported is theirs.

    Prompts make peft warn, which is silenced for as long as the run lasts.
    """
    prompt = {"peft": "prompt", "targets": [], "options": {"num_virtual_tokens": 2}}
    settings = {**small["settings"], "tuning": prompt}
    arguments = {**small, "settings": settings, "progress": True, "device": "cpu", "threads": 2, "rounds": 1}
    if error is not None:
        monkeypatch.setattr(loopback.LoopbackGrid, "pull_messages", raising(error("x")))
    finished.predict("an apple")
    before, threads = state(), set(threading.enumerate())
    with nullcontext() if error is None else pytest.raises(error, match="x"):
        run = fedllm.simulate(out=tmp_path / "run", data=rows, **arguments)
        run.predict("an apple")
        run.model()
    after = state()
    for part, was in before.items():
        assert after[part] == was, part
    # One that an earlier test has left may end meanwhile.
    assert set(threading.enumerate()) <= threads


@pytest.mark.slow
def test_progress_is_shown_or_not(
    small: dict[str, Any], rows: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fedllm.simulate(out=tmp_path / "silent", data=rows, **{**small, "rounds": 1})
    assert capsys.readouterr() == ("", "")
    fedllm.simulate(out=tmp_path / "told", data=rows, **{**small, "rounds": 1, "progress": True})
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[:2] for line in err.splitlines() if line.startswith("round ")] == [
        ["round", "0"],
        ["round", "1"],
    ]


@pytest.mark.slow
def test_a_script_without_a_guard_may_use_workers(
    small: dict[str, Any], finished: fedllm.Run, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Python runs a program's main module again in each process that it spawns."""
    arguments = {**small, "model": str(tiny_encoder), "data": str(tiny_texts), "out": str(tmp_path / "run")}
    script = tmp_path / "script.py"
    script.write_text(f"import fedllm\nprint('begun')\nfedllm.simulate(workers=2, **{arguments!r})\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (0, "begun\n"), done.stderr
    assert fedllm.open_run(tmp_path / "run").summary["state_sha256"] == finished.summary["state_sha256"]
