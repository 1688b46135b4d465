"""A real SuperLink and real SuperNodes over TLS: who may join, who may not, and who comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from starlette.responses import PlainTextResponse

from client.device.bundle import Bundle
from client.device.checks import check
from fedllm.errors import ConfigError, FedllmError
from fedllm.host.processes import Child, open_log
from server.federation.control import Control, read_public_key
from server.federation.link import connect, enrol, open_link
from server.federation.provision import add_node, provision, read, revoke
from server.federation.submit import bundle_of
from server.federation.superlink import Gate
from server.federation.tokens import EXECUTOR, TOKEN, TOKEN_HEADER
from tests.deployment.conftest import idle_run, supernode, supernodes
from tests.processes import alive, until

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


def test_a_node_that_is_told_to_leave_twice_leaves(keys: Keys, tmp_path: Path) -> None:
    folder, bundles = keys(1)
    with open_link(folder) as link, supernodes(bundles, tmp_path) as (member,):
        until(lambda: link.control.nodes()[0].status == "online")
        while member.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGINT)
            time.sleep(0.004)
            if "Traceback" in (log := (tmp_path / "node-0.log").read_text()):
                raise AssertionError(log)


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


LOCAL = ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("caller", LOCAL)
@pytest.mark.parametrize("path", ["/v1/runtime/acquire-task", "/docs", "/health"])
def test_this_host_reaches_the_rest(path: str, caller: str) -> None:
    assert _status(path, caller) == 200


@pytest.mark.parametrize("caller", LOCAL)
def test_the_control_api_asks_this_host_for_the_token(caller: str) -> None:
    path = "/v1/control/start-run"
    assert _status(path, caller, token="right") == 200
    assert _status(path, caller) == _status(path, caller, token="wrong") == 401
    assert _status(path, "192.0.2.1", token="right") == 403


def test_an_address_of_this_host_is_no_other_host_where_the_server_listens_on_it_alone() -> None:
    path = "/v1/runtime/acquire-task"
    assert _status(path, "192.0.2.7", bound="192.0.2.7") == 200
    assert _status(path, "192.0.2.7") == _status(path, "192.0.2.1", bound="192.0.2.7") == 403


def _status(path: str, caller: str, token: str | None = None, bound: str = "0.0.0.0") -> int:
    headers = {} if token is None else {TOKEN_HEADER: token}

    async def call() -> int:
        transport = httpx.ASGITransport(Gate(_anything, "right", bound), client=(caller, 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://superlink") as client:
            return (await client.post(path, headers=headers)).status_code

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


SERVE = """
import sys
from pathlib import Path
from server.federation.serving import serve
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
            assert tree
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


@pytest.mark.parametrize("bind", ["127.0.0.2", "::"])
def test_a_server_on_another_address_is_found_whatever_proxy_there_is(
    bind: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens on 127.0.0.1, the certificate was not made for the address, and the proxy is dead."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    folder, bundles = keys(1)
    with open_link(folder, bind=bind) as link, connect(folder) as control:
        assert link.control.address == control.address
        assert control.ready()
        monkeypatch.undo()
        node = bundles[0]._replace(server=control.address)
        with supernodes([node], tmp_path):
            assert idle_run(control, 1).outcome == "completed"


def test_another_user_of_this_host_commands_nothing(keys: Keys) -> None:
    """Runs are started with the token, tasks taken with the secret; both can be read by their owner alone."""
    folder, _ = keys(1)
    with open_link(folder) as link:
        for name in (TOKEN, EXECUTOR):
            assert stat.S_IMODE((folder / "superlink" / name).stat().st_mode) == 0o600
        bundle = bundle_of("os:system", "os:system", {})
        with Control(link.control.address, folder / "ca.pem", folder / "no-token") as stranger:
            assert not stranger.ready()
            with pytest.raises(httpx.HTTPStatusError, match="401"):
                stranger.start(bundle, {})
        runtime = RuntimeHttpClient.from_server_address(
            link.control.address,
            False,
            (folder / "ca.pem").read_bytes(),
            [RuntimeVersionHttpInterceptor(component_name="flower-superexec")],
        )
        with runtime, pytest.raises(httpx.HTTPStatusError, match="401"):
            runtime.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))


def test_a_body_without_a_key_is_refused_before_it_is_kept(keys: Keys) -> None:
    """100 MB in pieces: the SuperLink reads 64 kB of it and hangs up."""
    folder, _ = keys(1)

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1 << 20)

    with open_link(folder) as link:
        held = psutil.Process(link.child.pid).memory_info().rss
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        with httpx.Client(verify=context, base_url=f"https://localhost:{read(folder).port}") as client:
            try:
                status = client.post("/v1/fleet/push-object", content=pieces()).status_code
            except httpx.TransportError:
                status = 413  # it hung up while we were still sending
        assert status == 413
        assert psutil.Process(link.child.pid).memory_info().rss - held < 30e6
        assert link.control.ready()


def test_nothing_outlives_a_killed_server(keys: Keys, tmp_path: Path) -> None:
    folder, _ = keys(1)
    server = Child([sys.executable, "-c", SERVE, str(folder)], {}, open_log(tmp_path / "serve.log"))
    try:
        with connect(folder) as control:
            until(control.ready)
            tree = psutil.Process(server.pid).children(recursive=True)
            assert tree
            os.kill(server.pid, signal.SIGKILL)
            until(lambda: not any(map(alive, tree)))
    finally:
        server.stop()
