"""A real SuperLink and real SuperNodes over TLS: who may join, who may not, and who comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.responses import PlainTextResponse

from client.checks import Bundle, check
from fedllm.errors import ConfigError, FedllmError
from fedllm.processes import Child, open_log
from server.control import read_public_key
from server.link import connect, enrol, open_link
from server.provision import add_node, provision, read, revoke
from server.superlink import OnlyNodesFromOutside
from tests.deployment.conftest import idle_run, supernode, supernodes, until

pytestmark = pytest.mark.slow

Keys = Callable[[int], tuple[Path, list[Bundle]]]


def key_of(bundle: Bundle, tmp_path: Path) -> tuple[bool, str]:
    found = {item.name: item for item in check(bundle, state=tmp_path)}
    return found["key"].good, found["key"].sentence


def test_nodes_join_work_and_leave(keys: Keys, tmp_path: Path) -> None:
    folder, bundles = keys(2)
    with open_link(folder) as link:
        assert key_of(bundles[0], tmp_path) == (True, "the server knows node 0")
        assert {node.status for node in link.control.nodes()} == {"registered"}
        with supernodes(bundles, tmp_path):
            run = idle_run(link.control, 2, rounds=2)
            assert (run.status, run.outcome) == ("finished", "completed")
            assert run.bytes_up > 0
            assert run.bytes_down > 0
            assert {(node.name, node.status) for node in link.control.nodes()} == {
                ("node-0", "online"),
                ("node-1", "online"),
            }
            assert "round 1" in "".join(link.control.logs(run.id))
            assert not link.control.stop(run.id)
        with pytest.raises(FedllmError, match="knows no run 7"):
            link.control.run(7)
        with pytest.raises(ConfigError, match="cannot listen"), open_link(folder):
            pass


def test_a_stranger_is_refused_and_a_revoked_node_is_dropped(keys: Keys, tmp_path: Path) -> None:
    folder, bundles = keys(1)
    provision(tmp_path / "other", "localhost", 2)
    # The right authority and address, but a key that the server never saw.
    stranger = Bundle.read(tmp_path / "other/bundles/node-1")
    stranger = stranger._replace(server=bundles[0].server)
    (stranger.folder / "ca.pem").write_bytes(bundles[0].authority.read_bytes())
    with open_link(folder) as link:
        refused = supernode(stranger, tmp_path)
        try:
            until(lambda: refused.poll() is not None)
        finally:
            refused.stop()
        assert "activat" in (tmp_path / "node-1.log").read_text().lower()
        # The server's log names whom it refused.
        key = read_public_key(tmp_path / "other/nodes/node-1.pub").decode().splitlines()[1]
        assert key in (folder / "superlink/superlink.log").read_text()
        assert key_of(stranger, tmp_path)[0] is False
        assert [node.name for node in link.control.nodes()] == ["node-0"]
        with supernodes(bundles, tmp_path) as (member,):
            until(lambda: link.control.nodes()[0].status == "online")
            revoke(folder, 0)
            assert enrol(read(folder), link.control) == ["node-0 may no longer join"]
            until(lambda: member.poll() is not None)
            assert "revoked" in key_of(bundles[0], tmp_path)[1]
        newcomer = Bundle.read(add_node(folder))
        assert enrol(read(folder), link.control) == ["node-1 may join"]
        assert enrol(read(folder), link.control) == []
        with supernodes([newcomer], tmp_path):
            assert idle_run(link.control, 1).outcome == "completed"


@pytest.mark.soak
def test_without_keys_anybody_may_join_and_commands_know_it(keys: Keys, tmp_path: Path) -> None:
    folder, bundles = keys(1)
    with open_link(folder, insecure=True) as link:
        node = supernode(bundles[0], tmp_path, insecure=True)
        try:
            with connect(folder) as control:
                assert idle_run(control, 1).outcome == "completed"
        finally:
            node.stop()
        assert link.control.ready()
    with open_link(folder), connect(folder) as control:
        assert control.ready()


async def _anything(scope: object, receive: object, send: object) -> None:
    await PlainTextResponse("inside")(scope, receive, send)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/fleet"])
@pytest.mark.parametrize("caller", ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_other_hosts_reach_the_fleet_api_alone(path: str, caller: str) -> None:
    assert _status(path, caller) == 403
    assert _status("/v1/fleet/pull-messages", caller) == _status("/health", caller) == 200


@pytest.mark.parametrize("caller", ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"])
def test_this_host_reaches_everything(caller: str) -> None:
    assert _status("/v1/control/start-run", caller) == 200


def _status(path: str, caller: str) -> int:
    import asyncio

    async def call() -> int:
        transport = httpx.ASGITransport(OnlyNodesFromOutside(_anything), client=(caller, 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://superlink") as client:
            return (await client.post(path)).status_code

    return asyncio.run(call())


def test_the_gate_stands_in_the_real_superlink(keys: Keys) -> None:
    folder, _ = keys(1)
    outside = next(
        item.address
        for name, items in psutil.net_if_addrs().items()
        for item in items
        if item.family.name == "AF_INET" and not item.address.startswith("127.")
    )
    with open_link(folder) as link:
        # The certificate does not name this address; here only the gate is of interest.
        port = read(folder).port
        with httpx.Client(verify=False, base_url=f"https://{outside}:{port}") as client:
            assert client.post("/v1/control/list-runs").status_code == 403
            assert client.post("/v1/fleet/pull-messages").status_code != 403
            assert client.get("/health").status_code == 200
        assert link.control.ready()


def alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


SERVE = """
import sys
from pathlib import Path
from server.link import serve
serve(Path(sys.argv[1]), report=print)
"""


def test_a_killed_superlink_comes_back_with_its_nodes(keys: Keys, tmp_path: Path) -> None:
    folder, bundles = keys(2)
    server = Child([sys.executable, "-c", SERVE, str(folder)], {}, open_log(tmp_path / "serve.log"))
    try:
        with connect(folder) as control, contextlib.ExitStack() as stack:
            until(lambda: control.ready() and len(control.nodes()) == 2)
            stack.enter_context(supernodes(bundles, tmp_path))
            until(lambda: [node.status for node in control.nodes()] == ["online", "online"])
            identities = {node.id for node in control.nodes()}
            (superlink,) = psutil.Process(server.pid).children()
            superlink.kill()
            until(lambda: not control.ready())
            until(control.ready)
            assert {node.id for node in control.nodes()} == identities
            assert idle_run(control, 2).outcome == "completed"
            tree = psutil.Process(server.pid).children(recursive=True)
            assert len(tree) >= 2
            os.kill(server.pid, signal.SIGINT)
            until(lambda: server.poll() is not None)
            assert server.poll() == 0
            assert not any(map(alive, tree))
        words = (tmp_path / "serve.log").read_text()
        assert "ended unexpectedly" in words
        assert words.rstrip().endswith("stopped")
    finally:
        server.stop()


def test_nothing_outlives_a_killed_server(keys: Keys, tmp_path: Path) -> None:
    folder, _ = keys(1)
    server = Child([sys.executable, "-c", SERVE, str(folder)], {}, open_log(tmp_path / "serve.log"))
    try:
        with connect(folder) as control:
            until(control.ready)
            tree = psutil.Process(server.pid).children(recursive=True)
            os.kill(server.pid, signal.SIGKILL)
            until(
                lambda: not any(process.is_running() and process.status() != "zombie" for process in tree), 20
            )
    finally:
        server.stop()
