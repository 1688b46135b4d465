"""Who gets in, as whom, and who does not."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from fedllm.errors import ConfigError
from server.dashboard.actions.operations import Operations
from server.dashboard.app import create
from server.dashboard.door.access import Accounts, Principal, Sessions, Throttle
from server.dashboard.start import secret
from tests.dashboard.client import TestClient
from tests.dashboard.conftest import LogIn
from tests.reports.made_up import make_run

CLOSED = [
    "/",
    "/metrics",
    "/api/runs",
    "/api/openapi.json",
    "/api/nothing",
    "/runs/a",
    "/_nicegui/x",
    "/nothing",
]


def test_health_is_open(stranger: TestClient) -> None:
    assert stranger.get("/healthz").text == "ok\n"


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_strangers_learn_nothing_not_even_what_exists(stranger: TestClient, path: str, method: str) -> None:
    answer = stranger.request(method, path)
    assert answer.status_code == 401
    assert answer.json() == {"detail": "log in at /login, or send Authorization: Bearer TOKEN"}


def test_a_browser_is_shown_the_login_form(stranger: TestClient) -> None:
    answer = stranger.get("/runs/a", headers={"accept": "text/html"})
    assert answer.status_code == 401
    assert 'name="next" value="/runs/a"' in answer.text


def test_websockets_open_to_logins_of_this_site_only(
    web: FastAPI, stranger: TestClient, operator: TestClient
) -> None:
    async def greet(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")

    web.router.routes.insert(0, WebSocketRoute("/greeting", greet))
    for client, origin in ((stranger, "http://dash.test"), (operator, "http://evil.test")):
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("ws://dash.test/greeting", headers={"origin": origin}),
        ):
            pass
    with operator.websocket_connect(
        "ws://dash.test/greeting", headers={"origin": "http://dash.test"}
    ) as socket:
        assert socket.receive_text() == "hello"


def test_login_opens_a_session_that_scripts_cannot_read(ops: Operations, stranger: TestClient) -> None:
    password = str(ops.accounts.first())
    answer = stranger.post("/login", data={"user": "operator", "password": password, "next": "/nodes"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/nodes")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert stranger.get("/api/session").json()["role"] == "operator"
    assert ops.accounts.first() is None


@pytest.mark.parametrize("target", ["//evil.test/", "https://evil.test/", "/\\evil.test", "javascript:x"])
def test_login_never_leads_elsewhere(ops: Operations, stranger: TestClient, target: str) -> None:
    password = str(ops.accounts.first())
    answer = stranger.post("/login", data={"user": "operator", "password": password, "next": target})
    assert answer.headers["location"] == "/"


def test_the_cookie_stays_on_tls_where_there_is_tls(ops: Operations) -> None:
    client = TestClient(create(ops), base_url="https://dash.test", follow_redirects=False)
    answer = client.post("/login", data={"user": "operator", "password": str(ops.accounts.first())})
    assert "secure" in answer.headers["set-cookie"].lower()
    assert "max-age" in answer.headers["strict-transport-security"]


def test_a_wrong_password_and_an_unknown_user_look_the_same(ops: Operations, stranger: TestClient) -> None:
    ops.accounts.first()
    one = stranger.post("/login", data={"user": "operator", "password": "x"})
    other = stranger.post("/login", data={"user": "nobody", "password": "x"})
    assert (one.status_code, one.text) == (other.status_code, other.text) == (401, one.text)


def test_guessing_is_slowed_down_even_with_the_right_password(ops: Operations, stranger: TestClient) -> None:
    password = str(ops.accounts.first())
    for _ in range(5):
        assert stranger.post("/login", data={"user": "operator", "password": "x"}).status_code == 401
    answer = stranger.post("/login", data={"user": "operator", "password": password})
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 60


def test_throttle_lets_go_after_its_window() -> None:
    clock = [0.0]
    throttle = Throttle(limit=2, window_s=10.0, now=lambda: clock[0])
    throttle.failed("a")
    clock[0] = 4.0
    throttle.failed("a")
    assert throttle.wait_s("a") == pytest.approx(6.0)
    assert throttle.wait_s("b") == 0.0
    clock[0] = 10.5
    assert throttle.wait_s("a") == 0.0


def test_sessions_end_when_idle_and_in_any_case() -> None:
    clock = [0.0]
    sessions = Sessions(idle_s=10.0, whole_s=25.0, now=lambda: clock[0])
    key = sessions.open("olive", "operator").session
    for clock[0] in (9.0, 18.0, 24.0):
        assert sessions.find(key) is not None
    clock[0] = 25.5
    assert sessions.find(key) is None
    key = sessions.open("olive", "operator").session
    clock[0] += 9.0
    assert sessions.find(key, touch=False) is not None
    clock[0] += 2.0
    assert sessions.find(key) is None


def test_logout_ends_the_session(operator: TestClient) -> None:
    cookies = dict(operator.cookies)
    operator.post("/logout")
    operator.cookies.update(cookies)
    assert operator.get("/api/runs").status_code == 401


def test_a_login_needs_its_csrf_token_for_changes(operator: TestClient) -> None:
    body = {"name": "grafana", "role": "viewer"}
    for header in ({"X-CSRF-Token": ""}, {"X-CSRF-Token": "x"}):
        assert operator.post("/api/access/tokens", json=body, headers=header).status_code == 403
    assert operator.post("/api/access/tokens", json=body).status_code == 201


def test_other_sites_cannot_post(operator: TestClient, stranger: TestClient) -> None:
    foreign = {"origin": "http://evil.test"}
    assert operator.post("/api/access/tokens", json={}, headers=foreign).status_code == 403
    assert stranger.post("/login", data={}, headers=foreign).status_code == 403


def test_tokens_open_the_api_and_nothing_after_they_are_revoked(
    operator: TestClient, stranger: TestClient
) -> None:
    token = operator.post("/api/access/tokens", json={"name": "ci", "role": "operator"}).json()["secret"]
    headers = {"Authorization": f"Bearer {token}"}
    assert stranger.get("/api/session", headers=headers).json()["name"] == "token ci"
    made = stranger.post("/api/access/users", json={"name": "new", "role": "viewer"}, headers=headers)
    assert made.status_code == 201
    assert operator.delete("/api/access/tokens/ci").status_code == 200
    assert stranger.get("/api/session", headers=headers).status_code == 401
    assert stranger.get("/api/session", headers={"Authorization": "Bearer x"}).status_code == 401


def test_viewers_look_and_change_nothing(ops: Operations, viewer: TestClient) -> None:
    make_run(ops.root / "a")
    assert viewer.get("/api/runs/a").status_code == 200
    assert viewer.get("/api/access").status_code == 403
    for path in ("/api/runs", "/api/runs/a/commands", "/api/runs/a/continue", "/api/access/tokens"):
        answer = viewer.post(path, json={})
        assert answer.status_code == 403
        assert "this needs the role operator" in answer.json()["detail"]


def test_whoever_is_removed_is_out_at_once(log_in: LogIn, operator: TestClient) -> None:
    other = log_in("otto", "operator")
    assert operator.delete("/api/access/users/otto").status_code == 200
    assert other.get("/api/runs").status_code == 401
    last = operator.delete("/api/access/users/olive")
    assert (last.status_code, "last operator" in last.json()["detail"]) == (422, True)


def test_every_answer_carries_the_security_headers(stranger: TestClient, operator: TestClient) -> None:
    for answer in (stranger.get("/healthz"), stranger.get("/"), operator.get("/api/runs")):
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


def test_large_bodies_are_refused_before_they_are_read(stranger: TestClient) -> None:
    assert stranger.post("/login", content=b"x" * 1_000_001).status_code == 413
    assert stranger.post("/login", content=iter([b"x"])).status_code == 411


def test_only_hashes_are_kept_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / "state")
    password, token = accounts.add_user("olive", "operator"), accounts.add_token("ci", "viewer")
    text = accounts.path.read_text()
    assert "$argon2id$" in text
    assert password not in text
    assert token not in text
    assert stat.S_IMODE(accounts.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(accounts.path.parent.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="is not a name"):
        accounts.add_user("<b>", "operator")


def test_nobody_is_demoted_by_being_added_again(operator: TestClient) -> None:
    again = operator.post("/api/access/users", json={"name": "olive", "role": "viewer"})
    assert (again.status_code, "already" in again.json()["detail"]) == (422, True)
    assert operator.get("/api/session").json()["role"] == "operator"


def test_the_last_operator_stays_one_and_a_lost_one_comes_back(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path / ".dashboard")
    accounts.add_user("olive", "operator")
    with pytest.raises(ConfigError, match="last operator"):
        accounts.renew_password("olive", "viewer")
    accounts.add_user("otto", "operator")
    accounts.renew_password("olive", "viewer")
    assert [accounts.role_of(name) for name in ("olive", "otto")] == ["viewer", "operator"]
    # As an older version could leave it: whoever holds the server's shell gets in again.
    held = json.loads(accounts.path.read_text())
    held["users"]["otto"]["role"] = "viewer"
    accounts.path.write_text(json.dumps(held))
    password = secret(tmp_path, user="otto", token=None, role=None)
    assert accounts.check_password("otto", password) == "operator"


def test_a_new_password_ends_the_sessions_of_the_old(log_in: LogIn, operator: TestClient) -> None:
    other = log_in("otto", "viewer")
    made = operator.post("/api/access/users/otto/password")
    assert (made.status_code, len(made.json()["secret"])) == (201, 20)
    assert other.get("/api/runs").status_code == 401
    assert operator.post("/api/access/users/nobody/password").status_code == 422
    viewer = log_in("vera", "viewer")
    assert viewer.post("/api/access/users/olive/password").status_code == 403


def test_a_token_in_use_is_not_replaced(operator: TestClient, stranger: TestClient) -> None:
    body = {"name": "ci", "role": "operator"}
    token = operator.post("/api/access/tokens", json=body).json()["secret"]
    again = operator.post("/api/access/tokens", json=body)
    assert (again.status_code, "revoke it first" in again.json()["detail"]) == (422, True)
    assert stranger.get("/api/session", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_the_audit_log_is_for_operators(viewer: TestClient) -> None:
    assert viewer.get("/api/audit").status_code == 403


def test_a_stranger_behind_the_same_proxy_locks_nobody_out(ops: Operations, stranger: TestClient) -> None:
    password = str(ops.accounts.first())
    for _ in range(6):
        refused = stranger.post("/login", data={"user": "mallory", "password": "x"})
    assert refused.status_code == 429
    assert stranger.post("/login", data={"user": "operator", "password": password}).status_code == 303


def test_many_names_from_one_address_are_slowed_down(stranger: TestClient) -> None:
    answers = [stranger.post("/login", data={"user": f"u{n}", "password": "x"}) for n in range(51)]
    assert [answer.status_code for answer in answers[-2:]] == [401, 429]


def test_a_trusted_proxy_tells_address_and_scheme(ops: Operations) -> None:
    app = create(ops, trusted_proxies=["192.0.2.0/24"])
    proxy = TestClient(app, base_url="http://dash.test", follow_redirects=False, client=("192.0.2.7", 1))
    login = {"user": "operator", "password": str(ops.accounts.first())}
    forwarded = {"X-Forwarded-For": "203.0.113.5", "X-Forwarded-Proto": "https"}
    answer = proxy.post("/login", data=login, headers=forwarded)
    assert "secure" in answer.headers["set-cookie"].lower()
    assert "max-age" in answer.headers["strict-transport-security"]
    noted = ops.audit_log(Principal("olive", "operator"))
    assert noted[0]["detail"] == "from 203.0.113.5"


def test_an_unnamed_proxy_is_not_believed_but_told(
    ops: Operations, capsys: pytest.CaptureFixture[str]
) -> None:
    client = TestClient(create(ops), base_url="http://dash.test", follow_redirects=False)
    login = {"user": "operator", "password": str(ops.accounts.first())}
    forwarded = {"X-Forwarded-For": "203.0.113.5", "X-Forwarded-Proto": "https"}
    answers = [client.post("/login", data=login, headers=forwarded) for _ in range(2)]
    assert "secure" not in answers[0].headers["set-cookie"].lower()
    assert ops.audit_log(Principal("olive", "operator"))[0]["detail"] == "from testclient"
    assert capsys.readouterr().err.count("--trusted-proxy testclient") == 1


def test_logins_are_audited(ops: Operations, operator: TestClient, stranger: TestClient) -> None:
    stranger.post("/login", data={"user": "olive", "password": "x"})
    noted = [(line["who"], line["action"]) for line in operator.get("/api/audit").json()]
    assert noted == [("olive", "login refused"), ("olive", "login")]
