"""Faults made for real: what dies is killed with signal 9, what lies is sent by a node with a good key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedllm.config import RunConfig
from fedllm.errors import RunFailed
from fedllm.runs import Run as StoredRun
from server.submit import resume
from simulations.loopback import simulate
from tests.deployment.conftest import until
from tests.deployment.federation import Federation, configuration, federation

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(900)]

EVERYONE = {"sample": 3, "quorum": 3, "deadline_s": 45.0, "retries": 9}
"""Every client counts in every round: whatever dies in between, the numbers are those of the simulation."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("f") / "federation", 3) as made:
        made.join(0, 1, 2)
        yield made


def compared(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Return the summary of the same run without deployment and without faults."""
    simulate(config, folder)
    return StoredRun(folder).summary


def quantised(encoder: Path, texts: Path, name: str, **server: Any) -> RunConfig:
    """LoRA with residuals on both sides: a reply that is lost or counted twice changes every later bit."""
    codec = {"up": "error_feedback(quantize(bits=4))", "down": "quantize(bits=8)"}
    return configuration(encoder, texts, name=name, codec=codec, server={**EVERYONE, **server})


def test_a_killed_worker_and_a_device_without_power(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = quantised(tiny_encoder, tiny_texts, "killed")
    run = three.submit(config)
    three.await_round(run, 1)
    three.process(0, "client.resident").kill()
    three.kill(1)
    three.join(1)
    summary = three.finish(run)
    assert summary["state_sha256"] == compared(config, tmp_path / "simulated")["state_sha256"]
    assert "the worker ended with status -9" in three.said(0)


def test_a_killed_server_app_is_resumed(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = quantised(tiny_encoder, tiny_texts, "app")
    run = three.submit(config)
    three.await_round(run, 1)
    pid = StoredRun(run.folder).pid
    assert pid is not None
    psutil.Process(pid).kill()
    with pytest.raises(RunFailed, match="--resume app"):
        three.finish(run)
    again = resume(three.folder, three.link.control, "app")
    summary = three.finish(again)
    assert summary["state_sha256"] == compared(config, tmp_path / "simulated")["state_sha256"]


def test_a_killed_superlink_loses_nothing(
    three: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = quantised(tiny_encoder, tiny_texts, "link")
    run = three.submit(config)
    three.await_round(run, 1)
    psutil.Process(three.link.child.pid).kill()
    # As fedllm server does: Flower's processes end with their parent, once that has been waited for.
    until(lambda: three.link.child.poll() is not None)
    until(lambda: StoredRun(run.folder).pid is None)
    with contextlib.ExitStack() as stack:
        three.restart_link(stack)
        until(lambda: len(three.online()) == 3, 180)
        summary = three.finish(resume(three.folder, three.link.control, "link"))
    assert summary["state_sha256"] == compared(config, tmp_path / "simulated")["state_sha256"]


def test_a_hostile_node_spoils_nothing(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    """Garbage, NaN, a short payload, a claim of 2 GB, a missed deadline, a full disk: one a round."""
    config = configuration(
        tiny_encoder,
        tiny_texts,
        name="hostile",
        rounds=6,
        server={"sample": 3, "quorum": 2, "deadline_s": 60.0, "retries": 9},
        tuning={"rank": 2, "alpha": 4.0, "targets": ("query", "value")},
    )
    with federation(tmp_path / "federation", 3) as made:
        made.join(0, 1)
        made.join(2, answer="tests.deployment.answers:hostile")
        run = made.submit(config)
        made.await_round(run, 0)
        summary = made.finish(run)
        outcomes = {row.round: row for row in StoredRun(run.folder).nodes(node=2) if row.exchange == "fit"}
    assert summary["status"] == "finished"
    assert {number: row.status for number, row in outcomes.items()} == {
        1: "failed",
        2: "rejected",
        3: "rejected",
        4: "rejected",
        5: "late",
        6: "failed",
    }
    assert "NaN" in str(outcomes[2].reason)
    assert "disk full" in str(outcomes[6].reason)
    assert "damaged" in str(outcomes[3].reason)
