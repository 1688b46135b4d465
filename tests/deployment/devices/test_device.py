"""What a device does by itself: pace, restarts, pauses, one client per state folder."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import filelock
import psutil
import pytest
from flwr.common import constant
from flwr.supercore.corestate import in_memory_corestate, sql_corestate

from client.device.bundle import Bundle
from client.device.participation import Device
from client.device.screen import Progress
from client.device.supernode import Pace
from client.device.supervisor import _tend_worker, join
from fedllm.errors import ConfigError
from fedllm.host.processes import Child, Kept, allow_slow_starts, open_log
from fedllm.host.resources import resident_bytes
from server.federation.provision import provision
from tests.processes import free_port, until

Battery = namedtuple("Battery", ["power_plugged"])


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.read(provision(tmp_path / "federation", "localhost", 1, port=free_port())[0])


def test_a_state_folder_serves_one_client(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with (
        filelock.FileLock(tmp_path / "state/lock"),
        pytest.raises(ConfigError, match="another client uses"),
    ):
        join(Device(bundle, tmp_path / "state"), report=lambda said: None, stop=threading.Event())


@pytest.mark.parametrize(
    ("battery", "asked", "reason"),
    [
        (Battery(power_plugged=False), True, "on battery"),
        (Battery(power_plugged=True), True, None),
        (Battery(power_plugged=False), False, None),
        (None, True, None),
    ],
)
def test_a_pause_on_battery(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    battery: Battery | None,
    asked: bool,
    reason: str | None,
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert Device(bundle, tmp_path, pause_on_battery=asked).reason_to_pause() == reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("GENERAL.METERED:yes\nGENERAL.METERED:no", "on a metered link"),
        ("GENERAL.METERED:yes (guessed)", "on a metered link"),
        ("GENERAL.METERED:no\nGENERAL.METERED:unknown", None),
        ("", None),
    ],
)
def test_a_pause_on_a_metered_link(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, reason: str | None
) -> None:
    program = tmp_path / "nmcli"
    program.write_text(f"#!/bin/sh\nprintf '{answer}\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert Device(bundle, tmp_path, pause_on_metered=True).reason_to_pause() == reason


def test_a_paused_device_starts_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: Battery(power_plugged=False), raising=False)
    lines: list[str] = []
    stop = threading.Event()
    device = Device(bundle, tmp_path / "state", pause_on_battery=True)
    thread = threading.Thread(
        target=join, args=(device,), kwargs={"report": lines.append, "status": lines.append, "stop": stop}
    )
    thread.start()
    until(lambda: any("paused on battery" in line for line in lines))
    stop.set()
    thread.join()
    assert "no worker" in lines[-2]
    assert not psutil.Process().children(recursive=True)


def test_the_pace_follows_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    pace = Pace()
    pace.sleep(0.5)  # Flower waits so for a reply that is being worked on
    assert slept == [0.1]
    while clock[0] < 100.0:
        pace.sleep(3)
    assert slept[1] == 0.1
    assert slept[-1] == 3.0
    assert all(earlier <= later for earlier, later in pairwise(slept))
    # Never more than a tenth of the wait so far is added to it, beyond the shortest pause.
    waited = 0.1
    for pause in slept[1:]:
        assert pause <= max(0.1, 0.1 * waited) + 1e-9
        waited += pause


def test_slow_starts_have_time_and_heartbeats_stay_as_flower_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for corestate in (in_memory_corestate, sql_corestate):
        # Fails where a later Flower calls them otherwise.
        monkeypatch.setattr(corestate, "HEARTBEAT_DEFAULT_INTERVAL", constant.HEARTBEAT_DEFAULT_INTERVAL)
        monkeypatch.setattr(corestate, "HEARTBEAT_PATIENCE", constant.HEARTBEAT_PATIENCE)
        before = corestate.HEARTBEAT_PATIENCE * corestate.HEARTBEAT_DEFAULT_INTERVAL
        allow_slow_starts(corestate)
        assert before == corestate.HEARTBEAT_PATIENCE * corestate.HEARTBEAT_DEFAULT_INTERVAL
        assert corestate.HEARTBEAT_DEFAULT_INTERVAL == 120


def test_restarts_come_ever_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("fedllm.host.processes.time.monotonic", lambda: clock[0])
    log = open_log(tmp_path / "log")
    kept = Kept("worker", lambda: Child([sys.executable, "-S", "-c", "raise SystemExit(3)"], {}, log))
    delays = []
    for _ in range(11):
        kept.tend()
        while (said := kept.tend()) is None:
            time.sleep(0.005)
        assert "the worker ended with status 3" in said
        delays.append(float(said.split()[-2]))
        clock[0] += delays[-1] - 0.5
        kept.tend()
        assert kept.pid is None
        clock[0] += 1.0
    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    kept.stop()


@pytest.mark.parametrize(
    ("idle_unload", "seconds", "there"), [(60.0, 59.0, True), (60.0, 61.0, False), (0.0, 1e6, True)]
)
def test_a_worker_comes_with_work_and_goes_when_there_is_none(
    idle_unload: float, seconds: float, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    words = [sys.executable, "-S", "-c", "import time; time.sleep(3600)"]
    worker = Kept("worker", lambda: Child(words, {}, open_log(tmp_path / "log")))
    progress = Progress()

    def tend() -> bool:
        _tend_worker(worker, progress, idle_unload, report=lambda said: None)
        return worker.pid is not None

    try:
        assert not tend()  # no message yet, no memory
        progress.read("INFO : Receiving: train message (ID: 1)")
        clock[0] += 1e5  # however long a step takes
        assert tend()
        progress.read("INFO : Sent successfully")
        clock[0] += seconds
        assert tend() == there
        progress.read("INFO : Receiving: train message (ID: 2)")
        assert tend()
    finally:
        worker.stop()


@pytest.mark.parametrize(
    "line",
    [
        "Sent successfully",
        "Run ID 5 is not in `RUNNING` status. Ignoring reply message 7.",
        "Run ID 5 is not in `RUNNING` status. Ignoring message 7.",
        "Failed to send message 7: the network ate it",
        "Failed to receive message 7: the network ate it",
        "Failed to create task for run ID 5. The message will not be processed.",
    ],
)
def test_a_device_is_idle_after_a_message_whatever_became_of_it(line: str) -> None:
    progress = Progress()
    progress.read("INFO : Receiving: train message (ID: 7)")
    assert progress.busy
    progress.read(f"INFO : {line}")
    assert not progress.busy


def test_a_parent_that_is_gone_before_its_child_looks_is_missed() -> None:
    """A device killed while its worker still imports: the worker must not stay behind."""
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    words = "from fedllm.host.processes import die_with_parent; die_with_parent(); input()"
    told = {**os.environ, "FEDLLM_PARENT": str(gone.pid)}
    with subprocess.Popen([sys.executable, "-c", words], env=told, stdin=subprocess.PIPE) as orphan:
        assert orphan.wait() == -signal.SIGTERM


def test_a_child_is_told_its_parent_and_tells_nobody(tmp_path: Path) -> None:
    words = (
        "import os; from fedllm.host.processes import die_with_parent; told = os.environ['FEDLLM_PARENT'];"
        "die_with_parent(); print(told, 'FEDLLM_PARENT' in os.environ, oct(os.umask(0)))"
    )
    child = Child([sys.executable, "-c", words], {}, open_log(tmp_path / "log"), private=True)
    until(lambda: child.poll() is not None)
    child.stop()
    assert (tmp_path / "log").read_text().split()[-3:] == [str(os.getpid()), "False", "0o77"]


def test_a_state_folder_that_was_open_is_closed(bundle: Bundle, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o755)
    stop = threading.Event()
    stop.set()
    join(Device(bundle, state), report=lambda said: None, stop=stop)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_resident_memory_counts_children_and_forgives_the_dead() -> None:
    assert resident_bytes(psutil.Process().pid) > 10_000_000
    assert resident_bytes(2**22 + 1) == 0


def test_a_log_is_bounded_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedllm.host.processes.LOG_BYTES", 1000)
    log = open_log(tmp_path / "deep/client.log")
    for number in range(300):
        log.info("line %d", number)
    files = sorted((tmp_path / "deep").iterdir())
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) <= 4000
    assert "line 299" in files[0].read_text()
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
