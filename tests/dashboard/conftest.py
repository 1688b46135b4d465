"""A desk over made-up runs, and clients of its API: an operator's and a viewer's login, a script's token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import argon2
import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser

from server.dashboard import access
from server.dashboard.app import create
from server.dashboard.desk import Desk
from tests.dashboard.browser import chromium
from tests.dashboard.client import TestClient

LogIn = Callable[..., TestClient]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk whose password hashes are as weak as they can be, for speed."""
    weak = argon2.PasswordHasher.from_parameters(argon2.profiles.CHEAPEST)
    monkeypatch.setattr(argon2, "PasswordHasher", lambda: weak)
    return Desk(tmp_path / "runs")


@pytest.fixture
def web(desk: Desk) -> FastAPI:
    return create(desk)


@pytest.fixture
def stranger(web: FastAPI) -> Iterator[TestClient]:
    with TestClient(web, base_url="http://dash.test", follow_redirects=False) as client:
        yield client


@pytest.fixture
def log_in(web: FastAPI, desk: Desk) -> LogIn:
    """Return a client with a session of its own, which sends the CSRF token with everything."""

    def enter(name: str = "olive", role: access.Role = "operator") -> TestClient:
        client = TestClient(web, base_url="http://dash.test", follow_redirects=False)
        password = desk.accounts.add_user(name, role)
        answer = client.post("/login", data={"user": name, "password": password})
        assert answer.status_code == 303
        client.headers["X-CSRF-Token"] = client.get("/api/session").json()["csrf"]
        return client

    return enter


@pytest.fixture
def operator(log_in: LogIn) -> TestClient:
    return log_in()


@pytest.fixture
def viewer(log_in: LogIn) -> TestClient:
    return log_in("vera", "viewer")
