"""A device under test: restarts and heartbeats come soon, and what the test asks for goes wrong.

``python -m tests.deployment.unlucky`` is the device; its SuperNode is this module again.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

from client.device.bundle import Bundle
from fedllm.host.processes import Child

OPTIONS = "FEDLLM_TEST_OPTIONS"
ANSWER = "tests.deployment.answers:behave"
LOST = "lost"
"""File in a node's state folder: the share of its replies that never arrives."""
HEARTBEAT_SECONDS = 10
"""The least that Flower takes; a node counts as gone after two."""


def start_device(
    bundle: Bundle,
    state: Path,
    log: logging.Logger,
    *,
    data: Path | None = None,
    ahead: float = 0.0,
    namespace: str = "",
    idle: float = 0.0,
    peers: Path | None = None,
) -> Child:
    """Start a device, by choice in a network namespace; its clock is ``ahead`` seconds ahead.

    Its worker ends when there was no work for ``idle`` seconds; 0 is never, as a busy machine needs it.
    """
    options = {
        "bundle": str(bundle.folder),
        "state": str(state),
        "data": None if data is None else str(data),
        "ahead": ahead,
        "idle": idle,
        "peers": None if peers is None else str(peers),
    }
    command = [sys.executable, "-m", "tests.deployment.unlucky"]
    if namespace:
        command = ["ip", "netns", "exec", namespace, *command]
    return Child(command, {OPTIONS: json.dumps(options)}, log)


def device(bundle: str, state: str, data: str | None, ahead: float, idle: float, peers: str | None) -> None:
    """Take part as ``fedllm client`` does, with a worker whose answers another function gives."""
    from client.device import checks
    from client.device import supervisor as device
    from fedllm.host import processes

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=ahead)

    vars(checks)["datetime"] = Clock
    device.try_network = lambda bundle, insecure: list(checks.check_network(bundle, insecure=insecure))

    worker, supernode = device._worker_command, device._supernode_command

    def without_luck(*given: Any) -> list[str]:
        return [sys.executable, "-m", "tests.deployment.unlucky", *supernode(*given)[3:]]

    processes.LONGEST_DELAY = 2.0
    device._worker_command = lambda *given: [*worker(*given), "--answer", ANSWER]
    device._supernode_command = without_luck
    here = device.Device(
        Bundle.read(Path(bundle)),
        Path(state),
        data=data and Path(data),
        peers=peers and Path(peers),
        threads=1,
        idle_unload=idle,
    )
    device.join(here, report=print, status=print)


def supernode(ahead: float) -> None:
    """Be a SuperNode some of whose replies never arrive, or whose clock is wrong."""
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection, node_auth_http_interceptor, start_client_internal

    from client.device.supernode import main

    for module in (heartbeat, fleet_http_connection):
        vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT_SECONDS
    if ahead:
        right: Callable[[], datetime] = node_auth_http_interceptor.now
        node_auth_http_interceptor.now = lambda: right() + timedelta(seconds=ahead)
    vars(start_client_internal)["_push_messages"] = losing(start_client_internal._push_messages)
    main()


def losing(push: Callable[..., None]) -> Callable[..., None]:
    """Wrap what pushes replies so that some fail as they do when the network is gone."""
    state = Path(sys.argv[sys.argv.index("--node-config") + 1]).parent
    pick = random.Random(state.name)

    def push_some(*, send: Callable[..., Any], **others: Any) -> None:
        def send_some(*given: Any) -> Any:
            share = float((state / LOST).read_text()) if (state / LOST).exists() else 0.0
            if pick.random() < share:
                raise ConnectionError("the network ate it")
            return send(*given)

        push(send=send_some, **others)

    return push_some


if __name__ == "__main__":
    options = json.loads(os.environ[OPTIONS])
    if "--superlink" in sys.argv:
        supernode(options["ahead"])
    else:
        device(**options)
