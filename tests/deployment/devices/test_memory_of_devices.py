"""What ``fedllm bench device`` measures: shared pages once, a worker's peak, an idle device that is small."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from simulations.bench import device
from simulations.bench.device import Held, held
from tests.processes import until

MB = 1_000_000
HOLD = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file:
    shared = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
read = sum(shared[i] for i in range(0, len(shared), 4096))
own = bytearray(b"x" * int(sys.argv[2]))
open(sys.argv[3], "w").close()
time.sleep(3600)
"""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[psutil.Process]:
    """Two processes below one: each maps the same 40 MB of a file, and holds 20 MB of its own."""
    file = tmp_path / "shared"
    file.write_bytes(b"s" * 40 * MB)
    marks = [tmp_path / "a", tmp_path / "b"]
    start = (
        "import subprocess, sys, time\n"
        "for mark in sys.argv[4:]: subprocess.Popen([sys.executable, '-S', '-c', *sys.argv[1:4], mark])\n"
        "time.sleep(3600)"
    )
    given = [HOLD, str(file), str(20 * MB), *map(str, marks)]
    root = subprocess.Popen([sys.executable, "-S", "-c", start, *given])
    found = psutil.Process(root.pid)
    try:
        until(lambda: all(mark.exists() for mark in marks))
        yield found
    finally:
        for process in [*found.children(recursive=True), found]:
            process.kill()
        root.wait()


def test_a_page_of_a_file_counts_once_and_memory_of_their_own_for_each(two: psutil.Process) -> None:
    seen = held(two.pid)
    tree = [two, *two.children()]
    assert seen.processes == len(tree) == 3
    # What the kernel calls resident differs by what it does for itself between two looks.
    assert seen.rss_bytes == pytest.approx(sum(p.memory_info().rss for p in tree), rel=0.05)
    interpreters = 3 * 15 * MB  # a bare one takes 7 to 12
    assert 2 * 40 * MB + 2 * 20 * MB < seen.rss_bytes < 2 * 40 * MB + 2 * 20 * MB + interpreters
    assert 40 * MB + 2 * 20 * MB < seen.bytes < 40 * MB + 2 * 20 * MB + interpreters
    assert seen.rss_bytes - seen.bytes >= 40 * MB
    assert seen.worker_bytes == 0


def test_the_largest_of_each_figure_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [Held(1, 1, 1, 1), Held(7, 8, 3, 4), Held(5, 9, 2, 0)]
    monkeypatch.setattr(device, "held", lambda pid: looks.pop() if len(looks) > 1 else looks[0])
    monkeypatch.setattr(device, "_LOOKS_APART", 0.001)
    assert device._watch(0, lambda: until(lambda: len(looks) == 1)) == Held(7, 9, 3, 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_device_is_small_before_its_work_and_after_it() -> None:
    found = device.run(rounds=1, methods=("lora",))
    assert list(found) == ["idle", "lora", "idle_again"]
    for situation in ("idle", "idle_again"):
        assert found[situation]["worker_bytes"] == 0
        assert found[situation]["rss_bytes"] < 250 * MB
    assert found["lora"]["worker_bytes"] > 400 * MB
    assert found["lora"]["rss_bytes"] > found["lora"]["bytes"] > found["lora"]["worker_bytes"]
