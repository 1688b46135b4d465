"""Faults made for real: what dies is killed with signal 9, what lies is sent by a node with a good key.

The numbers of every run here are those of a simulation in which the same replies count: nothing is lost and
nothing counts twice, residuals on both sides included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedllm.errors import RunFailed
from fedllm.runs.reader import Run as StoredRun
from server.federation.submit import resume
from tests.deployment.federation import (
    ANY_TWO,
    EVERYONE,
    Federation,
    counted,
    ends_right,
    federation,
    outcomes,
    quantised,
)
from tests.processes import orphans_unburied, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def three(
    tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, tiny_texts: Path
) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("f") / "federation", 3) as made:
        made.join(0, 1, 2)
        made.warm_up(tiny_encoder, tiny_texts)
        made.ask("unhurried", 0, 1, 2)
        yield made


@pytest.fixture(autouse=True)
def _nothing_left(three: Federation) -> Iterator[None]:
    yield
    three.stop_runs()


def test_a_worker_is_killed_and_a_node_loses_power_while_it_trains(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = quantised(tiny_encoder, tiny_texts, "killed", EVERYONE, rounds=6)
    run = three.submit(config)
    three.await_round(run, 1)
    three.process(0, "client.resident").kill()
    three.await_work(1)
    three.kill(1)
    three.join(1)
    ends_right(run, three.finish(run), config, tmp_path)
    assert set(map(len, counted(run).values())) == {3}
    assert "the worker ended with status -9" in three.said(0)


def test_a_killed_server_app_is_resumed(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = quantised(tiny_encoder, tiny_texts, "app", EVERYONE, rounds=6)
    run = three.submit(config)
    three.await_round(run, 1)
    pid = StoredRun(run.folder).pid
    assert pid is not None
    psutil.Process(pid).kill()
    with pytest.raises(RunFailed, match="its server process died; go on with: fedllm run --resume app"):
        three.finish(run)
    again = resume(three.folder, three.link.control, "app")
    ends_right(again, three.finish(again), config, tmp_path)


def test_a_killed_superlink_loses_nothing(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = quantised(tiny_encoder, tiny_texts, "link", EVERYONE, rounds=6)
    run = three.submit(config)
    three.await_round(run, 1)
    with orphans_unburied():
        psutil.Process(three.link.child.pid).kill()
        # As fedllm server does: Flower's processes end with their parent, once that has been waited for.
        until(lambda: three.link.child.poll() is not None)
        until(lambda: StoredRun(run.folder).pid is None)
    three.restart_link()
    until(lambda: len(three.online()) == 3)
    again = resume(three.folder, three.link.control, "link")
    ends_right(again, three.finish(again), config, tmp_path)


def test_a_node_leaves_and_comes_back_with_its_residuals(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Rounds go on without it, at the quorum; then it starts from its last reply that counted."""
    config = quantised(tiny_encoder, tiny_texts, "away", ANY_TWO, rounds=6)
    run = three.submit(config)
    three.await_round(run, 1)
    away = 1 + three.hold(run, lambda: three.leave(2))
    three.await_round(run, away)
    three.hold(run, lambda: three.join(2))
    summary = three.finish(run)
    ends_right(run, summary, config, tmp_path)
    assert 2 not in counted(run)[away]
    assert 2 in counted(run)[6]
    assert "state_lost" not in outcomes(run, 2)[6].metrics


def test_a_hostile_node_spoils_nothing(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Garbage, NaN, a short payload, a claim of 16 GB, a missed deadline, a full disk: one a round."""
    three.ask("hostile", 2)
    config = quantised(
        tiny_encoder, tiny_texts, "hostile", {**ANY_TWO, "deadline_s": three.deadline_s}, rounds=6
    )
    run = three.submit(config)
    summary = three.finish(run)
    three.ask("unhurried", 2)
    ends_right(run, summary, config, tmp_path)
    found = outcomes(run, 2)
    told = {number: (row.status, str(row.reason)) for number, row in found.items()}
    assert [status for status, _ in told.values()] == [
        "failed", "rejected", "rejected", "rejected", "late", "failed",
    ]  # fmt: skip
    for number, reason in {2: "NaN", 3: "damaged", 4: "[2000000000] and has 3 bytes", 6: "disk full"}.items():
        assert reason in told[number][1]
    assert "resume" not in told[6][1]


@pytest.mark.soak
def test_a_third_of_all_replies_is_lost(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    three.lose(0.3, 0, 1, 2)
    config = quantised(
        tiny_encoder, tiny_texts, "lossy", {**ANY_TWO, "deadline_s": three.deadline_s}, rounds=3
    )
    run = three.submit(config)
    summary = three.finish(run)
    three.lose(0.0, 0, 1, 2)
    ends_right(run, summary, config, tmp_path)
    assert min(map(len, counted(run).values())) < 3


def test_a_wrong_clock_keeps_one_node_out_and_nobody_else(three: Federation) -> None:
    three.leave(2)
    three.join(2, ahead=60.0, wait=False)
    # A busy machine takes a few seconds over the question.
    until(lambda: re.search(r"clock: 6\d s ahead of the server's", three.said(2)))
    until(lambda: three.online() == {"node-0", "node-1"})
