"""The cable of one device is pulled and plugged in again, between network namespaces of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.runs.reader import Run as StoredRun
from tests.deployment.federation import ANY_TWO, counted, ends_right, federation, outcomes, quantised
from tests.processes import until

HERE, THERE, INSIDE = "10.213.7.1", "10.213.7.2", "fedllm-test"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def allowed() -> bool:
    """Whether this user may make namespaces and links: root outside of most containers."""
    trial = "ip link add t0 type veth peer name t1"
    return (
        os.geteuid() == 0
        and shutil.which("ip") is not None
        and subprocess.run(["unshare", "-n", "sh", "-c", trial], capture_output=True).returncode == 0
    )


pytestmark = [
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not allowed(), reason="this user may not make network namespaces"),
]


@pytest.fixture
def cable() -> Iterator[str]:
    """A namespace joined to this one by a cable; returns the name of this end."""
    with contextlib.ExitStack() as stack:
        ip("netns", "add", INSIDE)
        stack.callback(ip, "netns", "del", INSIDE)
        ip("link", "add", "fedllm-here", "type", "veth", "peer", "name", "fedllm-there", "netns", INSIDE)
        ip("addr", "add", f"{HERE}/24", "dev", "fedllm-here")
        ip("link", "set", "fedllm-here", "up")
        for words in (
            ["addr", "add", f"{THERE}/24", "dev", "fedllm-there"],
            ["link", "set", "fedllm-there", "up"],
        ):
            ip("-n", INSIDE, *words)
        ip("-n", INSIDE, "link", "set", "lo", "up")
        yield "fedllm-here"


def status_from_there(url: str) -> str:
    code = "import httpx, sys; print(httpx.post(sys.argv[1], verify=False).status_code)"
    command = ["ip", "netns", "exec", INSIDE, sys.executable, "-c", code, url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_cable_is_pulled_and_plugged_in_again(
    cable: str, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    with federation(tmp_path / "federation", 3, host=HERE) as made:
        made.join(0, 1)
        made.join(2, namespace=INSIDE)
        made.warm_up(tiny_encoder, tiny_texts)

        def plugged_in() -> None:
            until(lambda: "node-2" not in made.online(), 90)
            ip("link", "set", cable, "up")
            until(lambda: "node-2" in made.online(), 120)

        config = quantised(tiny_encoder, tiny_texts, "cut", ANY_TWO, rounds=5)
        made.ask("unhurried", 0, 1, 2)
        run = made.submit(config)
        made.await_round(run, 1)
        made.await_work(2)
        ip("link", "set", cable, "down")
        cut = StoredRun(run.folder).rounds()[-1].round + 1
        made.await_round(run, cut)
        made.hold(run, plugged_in)
        ends_right(run, made.finish(run), config, tmp_path)
        assert 2 not in counted(run)[cut]
        assert 2 in counted(run)[5]
        assert "state_lost" not in outcomes(run, 2)[5].metrics
        # What the middleware promises, from a host that is another one.
        base = f"https://{made.bundles[2].server}/v1"
        assert status_from_there(f"{base}/control/list-runs") == "403"
        assert status_from_there(f"{base}/fleet/pull-messages") != "403"
