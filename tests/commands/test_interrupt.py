"""Ctrl-C in a terminal ends a command with 130 and a sentence that says how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedllm.runs.reader import Run
from fedllm.runs.records import FILE

FEDLLM = [sys.executable, "-c", "from fedllm.cli import main; main()"]
Interrupted = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def tiny(tiny_encoder: Path, tiny_texts: Path) -> list[object]:
    """Words that simulate far more rounds of a small model than a test waits for."""
    settings = (
        *(f"model.name={tiny_encoder}", f"data.path={tiny_texts}", "rounds=10000", "clients=2"),
        *("training.local_steps=1", "training.batch_size=2", "data.max_length=8", "evaluation.every=0"),
    )
    return ["quickstart", *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture
def interrupted(tmp_path: Path) -> Interrupted:
    """Press Ctrl-C once ``ready``: the signal reaches the whole process group, as a terminal sends it."""

    def run(words: Sequence[object], ready: Callable[[], bool]) -> tuple[int, str, str]:
        with subprocess.Popen(
            [*FEDLLM, *map(str, words)],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            # Whoever runs the tests in the background made this signal ignored, which children inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            deadline = time.monotonic() + 240
            while not ready():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, "not ready in time"
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGINT)
            # What is awaited is the end, not the end of standard input.
            process.wait()
            out, err = process.communicate()
        return process.returncode, out, err

    return run


@pytest.mark.slow
def test_a_command_that_waits_ends_with_130(tmp_path: Path, interrupted: Interrupted) -> None:
    pipe = tmp_path / "texts"
    os.mkfifo(pipe)
    held: list[int] = []

    def read() -> bool:
        with contextlib.suppress(OSError):  # nobody reads yet
            held.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(held)

    assert interrupted(["predict", "nowhere", "--file", pipe], read) == (130, "", "interrupted\n")
    os.close(held[0])


@pytest.mark.slow
@pytest.mark.parametrize("engine", [[], ["--workers", "2"], ["--engine", "flower"]], ids=" ".join)
def test_a_simulation_says_how_to_go_on(
    tmp_path: Path, tiny: list[object], interrupted: Interrupted, engine: list[str]
) -> None:
    folder = tmp_path / "my run"
    code, out, err = interrupted(["simulate", *tiny, *engine, "--out", folder.name], _rounds(folder))
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; go on with: fedllm resume 'my run'"
    assert "Traceback" not in err
    # Ray's ServerApp is ended from outside, like one that was killed.
    assert Run(folder).status == ("interrupted" if "flower" in engine else "stopped")
    assert Run(folder).pid is None


@pytest.mark.slow
def test_a_sweep_says_what_was_not_begun_and_a_resumed_run_can_be_interrupted_again(
    tmp_path: Path, tiny: list[object], interrupted: Interrupted
) -> None:
    words = ["simulate", *tiny, "--seeds", "0..2", "--out", "all"]
    code, _, err = interrupted(words, _rounds(tmp_path / "all" / "seed0"))
    how = "interrupted; go on with: fedllm resume all/seed0"
    assert (code, err.splitlines()[-1]) == (130, f"{how} (2 more of these runs not begun)")
    done = len(Run(tmp_path / "all" / "seed0").rounds())
    code, _, err = interrupted(["resume", "all/seed0"], _rounds(tmp_path / "all" / "seed0", more_than=done))
    assert (code, err.splitlines()[-1]) == (130, how)


def _rounds(folder: Path, more_than: int = 1) -> Callable[[], bool]:
    def reached() -> bool:
        return (folder / FILE).is_file() and len(Run(folder).rounds()) > more_than

    return reached
