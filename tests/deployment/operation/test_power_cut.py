"""``fedllm server --resume`` on a real SuperLink: what was running when it went down goes on by itself."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import psutil
import pytest

from fedllm.host.processes import Child, open_log
from fedllm.runs.reader import Run as StoredRun
from server.federation.link import connect
from server.federation.submit import Submitted, find, follow, numbers
from tests.deployment.federation import Federation, ends_right, federation, quantised
from tests.processes import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SERVER = [sys.executable, "-c", "from fedllm.cli import main; main()", "server"]
BOTH = {"sample": 2, "quorum": 2, "deadline_s": 300.0, "retries": 9}


def kill(pid: int, *, below: bool) -> None:
    """Kill a process, and all that it has started where its machine loses power."""
    process = psutil.Process(pid)
    for doomed in [process, *(process.children(recursive=True) if below else [])]:
        with contextlib.suppress(psutil.NoSuchProcess):
            doomed.kill()


def sessions(made: Federation, name: str) -> int:
    return len(numbers(made.folder)[name])


def test_a_run_goes_on_after_a_power_cut_and_after_its_superlink_died(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = quantised(tiny_encoder, tiny_texts, "cut", BOTH, clients=2, rounds=5)
    with federation(tmp_path / "federation", 2) as made, contextlib.ExitStack() as stack:
        made.join(0, 1)
        made.ask("unhurried", 0, 1)
        run = made.submit(config)
        made.await_round(run, 1)
        kill(made.link.child.pid, below=True)
        until(lambda: made.link.child.poll() is not None)
        cut_at = StoredRun(run.folder).rounds()[-1].round
        log = tmp_path / "server.log"
        server = Child([*SERVER, str(made.folder), "--resume", "--dashboard-port", "0"], {}, open_log(log))
        stack.callback(server.stop, grace=30.0)
        until(lambda: sessions(made, "cut") == 2)
        made.await_round(run, cut_at + 1)
        (superlink,) = psutil.Process(server.pid).children()
        kill(superlink.pid, below=False)
        until(lambda: sessions(made, "cut") == 3)
        with connect(made.folder) as control:
            until(control.ready)
            follow(control, find(made.folder, "cut"))
        summary = json.loads((run.folder / "summary.json").read_text())
        ends_right(Submitted(run.id, run.folder), summary, config, tmp_path)
        assert log.read_text().count("cut goes on: it was running when the server went down") == 2
