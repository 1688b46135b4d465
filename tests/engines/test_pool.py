"""The pool of worker processes: a worker that dies costs nothing, and none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedllm.errors import RunFailed
from fedllm.runs.reader import Run
from fedllm.runs.records import RoundRecord
from fedllm.runs.writer import RunStore
from simulations.engines.loopback import simulate
from tests.processes import alive, until
from tests.rounds.federation import configuration

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LONG = 10_000
"""Rounds that are not over before the test is."""


def test_a_run_whose_worker_was_killed_says_how_to_go_on_and_does(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tiny_encoder, tiny_texts, rounds=6)
    simulate(config, tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    commit = RunStore.round

    def kill_one_worker(store: RunStore, record: RoundRecord, *given: Any) -> None:
        commit(store, record, *given)
        if record.round == 3:
            workers_of(os.getpid())[0].kill()

    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "round", kill_one_worker)
        with pytest.raises(RunFailed, match=r"worker process died.*fedllm resume .*killed --workers 1"):
            simulate(config, folder, workers=2)
    assert 3 <= rounds_of(folder) < config.rounds
    simulate(config, folder)
    assert Run(folder).summary["state_sha256"] == Run(tmp_path / "undisturbed").summary["state_sha256"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_run(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    config = configuration(tiny_encoder, tiny_texts, rounds=LONG)
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    folder = tmp_path / "run"
    script = (
        "import signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs\n"
        "from fedllm.config import RunConfig; from simulations.engines.loopback import simulate\n"
        "if __name__ == '__main__':\n"
        "    config = RunConfig.from_json(Path(sys.argv[1]).read_text())\n"
        "    simulate(config, Path(sys.argv[2]), workers=2)\n"
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "config.json"), str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as caller:
        until(lambda: rounds_of(folder) >= 2)
        workers = workers_of(caller.pid)
        assert len(workers) == 2
        # As a terminal does it: Ctrl-C reaches the whole group.
        os.killpg(caller.pid, ending) if ending == signal.SIGINT else caller.kill()
    until(lambda: not any(map(alive, workers)))
    assert 0 < rounds_of(folder) < LONG


def workers_of(pid: int) -> list[psutil.Process]:
    """The pool's processes; multiprocessing's resource tracker is none of them."""
    children = psutil.Process(pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def rounds_of(folder: Path) -> int:
    return len(Run(folder).rounds()) - 1 if (folder / "run.db").is_file() else 0
