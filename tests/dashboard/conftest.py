"""Operations over made-up runs, and clients of its API: an operator, a viewer and a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import argon2
import pytest
from fastapi import FastAPI

from server.dashboard.actions.operations import Operations
from server.dashboard.app import create
from server.dashboard.door import access
from tests.dashboard.client import TestClient

if TYPE_CHECKING:
    from playwright.sync_api import Browser

LogIn = Callable[..., TestClient]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.dashboard.browser import chromium

    with chromium() as found:
        yield found


@pytest.fixture(autouse=True)
def _weak_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of passwords as weak as they can be: those that users get take a third of a second each."""
    weak = argon2.PasswordHasher.from_parameters(argon2.profiles.CHEAPEST)
    monkeypatch.setattr(argon2, "PasswordHasher", lambda: weak)


@pytest.fixture
def ops(tmp_path: Path) -> Operations:
    return Operations(tmp_path / "runs")


@pytest.fixture
def web(ops: Operations) -> FastAPI:
    return create(ops)


@pytest.fixture
def stranger(web: FastAPI) -> Iterator[TestClient]:
    with TestClient(web, base_url="http://dash.test", follow_redirects=False) as client:
        yield client


@pytest.fixture
def log_in(web: FastAPI, ops: Operations) -> LogIn:
    """Return a client with a session of its own, which sends the CSRF token with everything."""

    def enter(name: str = "olive", role: access.Role = "operator") -> TestClient:
        client = TestClient(web, base_url="http://dash.test", follow_redirects=False)
        password = ops.accounts.add_user(name, role)
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
