"""kill -9 at random moments: what is on the disk is always a run that can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm.errors import StoreError
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.runs.records import FILE
from fedllm.runs.writer import RunStore

pytestmark = pytest.mark.slow

Kill = Callable[[Path, float], None]


@pytest.fixture(scope="module")
def killed_writer() -> Iterator[Kill]:
    script = Path(__file__).with_name("writer.py")
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def kill(folder: Path, after_seconds: float) -> None:
            print(folder, file=stdin, flush=True)
            child = int(stdout.readline())
            time.sleep(after_seconds)
            os.kill(child, signal.SIGKILL)
            assert stdout.readline() == "dead\n"

        yield kill
        stdin.close()


def _check(folder: Path) -> int:
    """Assert that a killed run is whole, before anything repairs it; return its last round."""
    run = Run(folder)
    assert run.status == "interrupted"
    rounds = run.rounds()
    last = len(rounds)
    assert [record.round for record in rounds] == list(range(1, last + 1))
    nodes = [(row.round, row.node) for row in run.nodes()]
    assert nodes == [(round, node) for round in range(1, last + 1) for node in range(3)]
    assert [row["bytes"] for row in run.traffic()] == [3 * round for round in range(1, last + 1)]
    assert [record.bytes_up for record in rounds] == [3 * round for round in range(1, last + 1)]
    lines = [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert lines in (list(range(1, last + 1)), list(range(1, last)))
    assert (run.summary or {"schema": 1})["schema"] == 1
    saved = checkpoint.latest(folder / "checkpoints")
    assert (saved.number if saved else 0) in (last, last - 1)
    if saved:
        assert torch.equal(saved.groups["tensors"]["w"], torch.full((50, 50), float(saved.number)))
        assert saved.facts == {"round": saved.number}
    return last


def _make(folder: Path, killed_writer: Kill) -> None:
    """Kill ever later until there is a run, which a busy machine may take its time over."""
    for attempt in range(1, 60):
        killed_writer(folder, 0.2 * attempt)
        if (folder / FILE).exists():
            return
    raise AssertionError(f"no run in {folder} after 12 s")


def test_a_run_killed_again_and_again_stays_whole_and_moves_on(tmp_path: Path, killed_writer: Kill) -> None:
    folder = tmp_path / "run"
    moments = np.random.default_rng(0)
    _make(folder, killed_writer)
    reached = [_check(folder)]
    # A busy machine may need more kills than fifteen, and later ones, to get ten rounds far.
    while (len(reached) <= 15 or reached[-1] < 10) and len(reached) < 90:
        patience = 1 + len(reached) / 15
        killed_writer(folder, patience * float(moments.uniform(0.02, 0.25)))
        reached.append(_check(folder))
    assert reached[-1] >= 10, reached
    with RunStore.open(folder) as store:
        assert store.last_round == reached[-1]
        lines = (folder / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(1, reached[-1] + 1))
        assert store.summary()["bytes"]["up"] == 3 * sum(range(1, reached[-1] + 1))


def test_a_run_killed_while_it_is_made_can_be_made_again(tmp_path: Path, killed_writer: Kill) -> None:
    seen: set[bool] = set()
    # Ever later, until the kills have come both before and after the run was there.
    for attempt in range(100):
        if attempt >= 20 and len(seen) == 2:
            break
        folder = tmp_path / str(attempt)
        killed_writer(folder, 0.0075 * attempt * 1.03**attempt)
        created = (folder / FILE).exists()
        seen.add(created)
        if created:
            with pytest.raises(StoreError, match="continue it with fedllm resume"):
                RunStore.create(folder, Run(folder).config)
        else:
            _make(folder, killed_writer)
        RunStore.open(folder).close()
        _check(folder)
    assert seen == {True, False}
