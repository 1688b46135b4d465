"""A device without work: no worker, no torch, little memory. With work again: the same bits as ever."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deployment.federation import Federation, ends_right, federation, quantised
from tests.processes import alive, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IDLE_SECONDS = 2.0
MOST_BYTES = 250e6
"""Of an idle node, all its processes, what they share counted for each."""
HEAVY = ("libtorch", "libarrow", "scipy")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A device whose user wants to hear little of Flower: what it prints starts the worker all the same."""
    with federation(tmp_path_factory.mktemp("f") / "federation", 1) as made:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("FLWR_LOG_LEVEL", "ERROR")
            made.join(0, idle=IDLE_SECONDS)
        yield made


def processes(one: Federation) -> list[psutil.Process]:
    device = psutil.Process(one.devices[0].pid)
    return [process for process in (device, *device.children(recursive=True)) if alive(process)]


def worker(one: Federation) -> psutil.Process | None:
    for process in processes(one):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "client.resident" in " ".join(process.cmdline()):
                return process
    return None


def is_idle(one: Federation) -> None:
    found = processes(one)
    assert len(found) == 2
    assert sum(process.memory_info().rss for process in found) < MOST_BYTES
    for process in found:
        loaded = {Path(area.path).name for area in process.memory_maps()}
        assert not [name for name in loaded if name.startswith(HEAVY)]


def test_a_device_that_waits_holds_little(one: Federation) -> None:
    is_idle(one)


def test_a_worker_that_ended_between_two_rounds_changes_no_bit(
    one: Federation, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    server = {"sample": 1, "quorum": 1, "deadline_s": 300.0}
    config = quantised(tiny_encoder, tiny_texts, "idle", server, clients=1, rounds=6)
    one.ask("unhurried", 0)
    run = one.submit(config)
    one.await_work(0)
    first = worker(one)
    assert first is not None
    held = one.hold(run, lambda: until(lambda: worker(one) is None))
    assert held < 6
    ends_right(run, one.finish(run), config, tmp_path)
    second = worker(one)
    assert second is None or second.pid != first.pid
    until(lambda: len(processes(one)) == 2)
    is_idle(one)
