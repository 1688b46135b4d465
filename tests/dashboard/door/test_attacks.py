"""What somebody might try who should not be in, or who is in and goes too far."""

from __future__ import annotations

import errno
import io
import os
import threading
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, StoreError
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.runs.writer import RunStore
from server.dashboard.actions import operations as operations
from server.dashboard.actions.launch import Launcher
from server.dashboard.actions.operations import Operations
from server.dashboard.app import create
from server.dashboard.door.access import Principal
from server.dashboard.pages.logs import audit_line
from server.dashboard.start import secret
from tests.dashboard.client import TestClient
from tests.dashboard.conftest import LogIn
from tests.dashboard.crowd import copies
from tests.reports.made_up import make_run

ODD_FORMS = (
    b"user=" + b"x" * 900_000 + b"&password=y",
    b"user=a%00b%0Ac%E2%80%AE&password=%00",
    b"user=%FF&password=p",
    b"user=a&user=b&password=c&password=d",
    b"",
)


def test_no_login_form_is_too_odd(ops: Operations, stranger: TestClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for body in ODD_FORMS:
        assert stranger.post("/login", content=body, headers=headers).status_code == 401
    noted = ops.audit_log(Principal("olive", "operator"))
    assert [line["action"] for line in noted] == ["login refused"] * len(ODD_FORMS)
    assert max(len(line["who"]) for line in noted) == 65
    assert "\n" in noted[3]["who"]
    assert "\n" not in audit_line(noted[3])


FILE = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nx\r\n--b--'


ODD_KINDS = {
    "multipart/form-data": b"x",
    "multipart/form-data; boundary=b": FILE,
    "application/json": b"{",
    "application/x-www-form-urlencoded": b"&".join(b"a=b" for _ in range(100)),
}


def test_no_login_request_is_a_fault_of_the_server(stranger: TestClient) -> None:
    for kind, body in ODD_KINDS.items():
        answer = stranger.post("/login", content=body, headers={"Content-Type": kind})
        assert answer.status_code in (400, 401), kind


def test_guesses_from_many_addresses_at_one_user_are_slowed_down_too(web: FastAPI, ops: Operations) -> None:
    ops.accounts.first()
    for number in range(50):
        client = TestClient(web, base_url="http://dash.test", client=(f"10.0.0.{number}", 1))
        assert client.post("/login", data={"user": "operator", "password": "x"}).status_code == 401
    client = TestClient(web, base_url="http://dash.test", client=("10.0.1.1", 1))
    assert client.post("/login", data={"user": "operator", "password": "x"}).status_code == 429
    assert client.post("/login", data={"user": "olive", "password": "x"}).status_code == 401


FILES = (
    "../run.db",
    "..%2f..%2f.dashboard%2faccess.json",
    "run.db",
    "lock",
    "adapter",
    "adapter.zip/x",
    "%00",
    "",
)


def test_only_named_files_are_handed_out(ops: Operations, operator: TestClient) -> None:
    make_run(ops.root / "a")
    for file in FILES:
        assert operator.get(f"/api/runs/a/files/{file}").status_code in (404, 422), file


def test_links_do_not_lead_out_of_an_adapter(ops: Operations, operator: TestClient, tmp_path: Path) -> None:
    folder = make_run(ops.root / "a").folder / "adapter"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("x")
    (folder / "file").symlink_to(tmp_path / "elsewhere" / "secret")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "own").write_text("y")
    packed = zipfile.ZipFile(io.BytesIO(operator.get("/api/runs/a/files/adapter.zip").content))
    assert packed.namelist() == ["adapter/own"]


def test_a_new_password_on_the_command_line_ends_the_sessions_of_the_old(
    ops: Operations, log_in: LogIn, operator: TestClient
) -> None:
    other = log_in("otto", "operator")
    assert other.get("/api/runs").status_code == 200
    secret(ops.root, user="otto", token=None, role="operator")
    assert other.get("/api/runs").status_code == 401
    assert operator.get("/api/runs").status_code == 200


def test_a_token_opens_no_websocket(web: FastAPI, ops: Operations, stranger: TestClient) -> None:
    async def greet(socket: WebSocket) -> None:
        await socket.accept()

    web.router.routes.insert(0, WebSocketRoute("/greeting", greet))
    headers = {"Authorization": f"Bearer {ops.accounts.add_token('ci', 'operator')}"}
    with pytest.raises(WebSocketDisconnect), stranger.websocket_connect("/greeting", headers=headers):
        pass


def test_a_setting_is_a_key_and_nothing_else(operator: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launcher, "document", lambda self, preset: {})
    for key in ("a=b", "name = 'x' #", "a\x00b", "", "--out", "a..b", "a\nb"):
        body = {"name": "x", "preset": "quickstart", "settings": {key: 1}}
        answer = operator.post("/api/runs", json=body)
        assert (answer.status_code, "is not a setting" in answer.json()["detail"]) == (422, True), key


def test_settings_longer_than_a_command_line_are_refused(ops: Operations) -> None:
    with pytest.raises(ConfigError, match="too long"):
        ops.launcher.resolve({}, {"data.path": "x" * 200_000})


def test_configurations_checked_at_the_same_time_are_not_mixed_up(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check waits, once its draft is written, until the other's is too."""
    both = threading.Barrier(2, timeout=240)

    def read_back(*arguments: str) -> list[dict[str, Any]]:
        both.wait()
        return [tomllib.loads(Path(arguments[1]).read_text())]

    monkeypatch.setattr("server.dashboard.actions.launch._run", read_back)
    found: dict[int, Any] = {}

    def check(seed: int) -> None:
        found[seed] = ops.launcher.resolve({"seed": seed}, {})

    threads = [threading.Thread(target=check, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1: {"seed": 1}, 2: {"seed": 2}}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, line: str) -> None:
        raise StoreError(f"disk full at {path.parent}: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(operations, "append_line", refuse)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_keeps_nobody_out_and_is_told(ops: Operations, log_in: LogIn) -> None:
    client = log_in()
    assert client.get("/api/runs").json() == []
    answer = client.post("/api/access/users", json={"name": "vera", "role": "viewer"})
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("user is done, but is not in the audit log: disk full")


def test_a_line_that_a_full_disk_cut_off_does_not_hide_the_others(
    ops: Operations, operator: TestClient
) -> None:
    with (ops.state / "audit.jsonl").open("ab") as file:
        file.write(b'{"at": 1.0, "who": "ol\n"text"\n')
    noted = operator.get("/api/audit").json()
    assert [line["action"] for line in noted] == ["damaged line", "damaged line", "login"]
    assert "ol" in noted[1]["detail"]


def test_accounts_that_cannot_be_read_let_nobody_in(ops: Operations, operator: TestClient) -> None:
    ops.accounts.path.write_text("{")
    answer = operator.get("/api/runs")
    assert (answer.status_code, "terminal" in answer.json()["detail"]) == (503, True)
    token = operator.get("/api/runs", headers={"Authorization": "Bearer x"})
    assert token.status_code == 503


def test_series_stay_bounded_however_many_runs_and_nodes_there_are(
    ops: Operations, operator: TestClient
) -> None:
    copies(ops.root, runs=51, rounds=1, nodes=2)
    with RunStore.create(ops.root / "live", RunConfig(name="live", clients=500)) as store:
        store.round(RoundRecord(round=1), [NodeRound(round=1, node=n, status="accepted") for n in range(500)])
        text = operator.get("/metrics").text
    assert text.count("fedllm_run_info{") == 50
    assert text.count("fedllm_node_compute_seconds{") == 200
    assert len(text.splitlines()) < 3500


def test_tls_is_required_of_the_cookie_at_logout_too(ops: Operations) -> None:
    client = TestClient(create(ops), base_url="https://dash.test", follow_redirects=False)
    client.post("/login", data={"user": "operator", "password": str(ops.accounts.first())})
    assert client.post("/logout").status_code == 303
    assert client.get("/api/runs").status_code == 401
