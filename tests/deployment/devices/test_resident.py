"""The resident worker over its real socket, in its real process."""

from __future__ import annotations

import os
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from client.resident import WorkerError, ask
from fedllm.host.processes import Child, Kept, open_log
from tests.processes import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MEMORY = 600_000_000
PATIENT_S = 240.0
"""More than any of these answers takes, however busy the machine."""


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A worker that is started again whenever it ends."""
    path = tmp_path_factory.mktemp("s") / "run" / "w"
    log = open_log(path.parent.parent / "worker.log")
    resource.setrlimit(resource.RLIMIT_CORE, (1000, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    command = [sys.executable, "-m", "client.resident", "--socket", str(path), "--memory", str(MEMORY)]
    command += ["--answer", "tests.deployment.answers:play"]
    worker = Kept("worker", lambda: Child(command, {}, log), first_delay=0.1)
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(0.05):
            worker.tend()

    keeper = threading.Thread(target=keep)
    keeper.start()
    ask(path, b"echo ", PATIENT_S)
    yield path
    stop.set()
    keeper.join()
    worker.stop()


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_bytes_come_back_as_they_went(socket: Path, size: int) -> None:
    request = b"echo " + os.urandom(size)
    assert ask(socket, request, PATIENT_S) == request


def test_one_process_answers_every_request(socket: Path) -> None:
    assert ask(socket, b"pid", PATIENT_S) == ask(socket, b"pid", PATIENT_S) != str(os.getpid()).encode()


def test_the_socket_is_private_to_its_user(socket: Path) -> None:
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700


def test_no_core_file_is_written_of_what_it_holds(socket: Path) -> None:
    limits = Path(f"/proc/{ask(socket, b'pid', PATIENT_S).decode()}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    assert line.split()[4] == "0"


def test_health_is_the_standard_protocol(socket: Path) -> None:
    # Wire format of grpc.health.v1 written out: field 1, a string; the answer's field 1 is 1 for SERVING.
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"\x0a\x0dfedllm.Worker", timeout=PATIENT_S) == b"\x08\x01"


def test_a_mistake_in_the_texts_arrives_without_what_it_quotes(socket: Path) -> None:
    with pytest.raises(WorkerError, match=r"^this device's texts are not what the run asks for"):
        ask(socket, b"data", PATIENT_S)


def test_a_bug_names_itself_and_the_worker_lives_on(socket: Path) -> None:
    before = ask(socket, b"pid", PATIENT_S)
    with pytest.raises(WorkerError, match=r"^KeyError, of which the device's own log says more$"):
        ask(socket, b"bug", PATIENT_S)
    assert ask(socket, b"pid", PATIENT_S) == before


def test_memory_is_limited_and_a_fresh_worker_follows(socket: Path) -> None:
    before = ask(socket, b"pid", PATIENT_S)
    with pytest.raises(WorkerError, match="out of memory"):
        ask(socket, f"eat {MEMORY}".encode(), PATIENT_S)
    until(lambda: not psutil.pid_exists(int(before)))
    assert ask(socket, f"eat {MEMORY // 6}".encode(), PATIENT_S) == str(MEMORY // 6).encode()
    assert ask(socket, b"pid", PATIENT_S) != before


def test_a_killed_worker_comes_back_and_the_request_is_answered(socket: Path, tmp_path: Path) -> None:
    before = ask(socket, b"pid", PATIENT_S)
    request = f"die {tmp_path / 'died'}".encode()
    assert ask(socket, request, PATIENT_S) == request
    after = ask(socket, b"pid", PATIENT_S)
    assert after != before
    os.kill(int(after), signal.SIGKILL)
    assert ask(socket, b"pid", PATIENT_S) != after


def test_a_request_that_always_kills_is_given_up(socket: Path) -> None:
    with pytest.raises(WorkerError, match="died 3 times"):
        ask(socket, b"crash", PATIENT_S)
    assert ask(socket, b"echo", PATIENT_S) == b"echo"


def test_a_missed_deadline_frees_the_worker(socket: Path) -> None:
    before = int(ask(socket, b"pid", PATIENT_S))
    began = time.monotonic()
    with pytest.raises(WorkerError, match="within 1 s"):
        ask(socket, b"sleep 3600", 1.0)
    assert time.monotonic() - began < 3600.0
    # The abandoned answer is not waited for: its process ends, the next request meets a new one.
    assert int(ask(socket, b"pid", PATIENT_S)) != before
    assert not psutil.pid_exists(before)


def test_no_worker_is_said_in_time(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="did not answer within 0 s"):
        ask(tmp_path / "none", b"echo", 0.3)
