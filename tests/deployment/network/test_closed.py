"""What stands around Flower's SuperLink: that each part of it is there, and what a refused body sets off."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.superlink import extensions
from flwr.superlink.servicer.fleet import fleet_handlers
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from server.federation import superlink
from server.federation.bodies import Allowance, BoundedBodies
from server.federation.tokens import BOUND, make
from server.federation.uploads import LIMITS, Limits, Uploads
from server.patience import PromptHeads


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a SuperLink that starts finds; all of it is put back."""
    make(tmp_path)
    (tmp_path / BOUND).write_text("0.0.0.0")
    Limits(tmp_path / LIMITS).set(7, 1000)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    flower = sys.modules[superlink.flower_superlink.__module__]
    for module, names in {
        extensions: ("get_middleware", "configure_app"),
        fleet_handlers: ("push_messages", "push_object"),
        flower: ("uvicorn", "get_client_tls_args"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    for name in ("die_with_parent", "allow_slow_starts"):
        monkeypatch.setattr(superlink, name, lambda *_: None)
    found: dict[str, Any] = {}

    def start() -> None:
        found["bodies"] = extensions.get_middleware()[1]
        found["push_object"] = fleet_handlers.push_object
        vars(flower)["uvicorn"].run(app=None)

    start.__module__ = flower.__name__
    monkeypatch.setattr(uvicorn, "run", lambda **options: found.update(options))
    monkeypatch.setattr(superlink, "flower_superlink", start)
    superlink.main()
    return found


def test_heads_are_hurried_bodies_bounded_and_uploads_counted(opened: dict[str, Any]) -> None:
    assert opened["http"] is PromptHeads
    assert opened["bodies"].cls is BoundedBodies
    uploads = opened["push_object"].__self__
    assert isinstance(uploads, Uploads)
    assert (uploads._most(7), uploads._most(8) > 1000) == (1000, True)


@pytest.mark.parametrize(
    ("path", "key", "refused"),
    [
        ("/v1/fleet/push-object", b"known", [4]),
        ("/v1/fleet/push-object", b"unknown", []),
        ("/v1/fleet/push-object", None, []),
        ("/v1/fleet/push-messages", b"known", []),
    ],
    ids=["piece", "unknown key", "no key", "no piece"],
)
def test_a_piece_that_is_too_large_ends_its_senders_reply(
    opened: dict[str, Any], monkeypatch: pytest.MonkeyPatch, path: str, key: bytes | None, refused: list[int]
) -> None:
    found: list[int] = []
    monkeypatch.setattr(Uploads, "refuse", lambda self, node, state, reason: found.append(node))
    monkeypatch.setattr(superlink, "signer", lambda scope: key)
    state = SimpleNamespace(get_node_id_by_public_key={b"known": 4}.get)
    app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: state)))
    opened["bodies"].kwargs["refused"]({"path": path, "app": app})
    assert found == refused


def test_a_refused_body_is_told_and_one_that_fits_is_not() -> None:
    told: list[str] = []

    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("inside")(scope, receive, send)

    async def post(size: int) -> int:
        app = BoundedBodies(
            inside, lambda scope: Allowance(100, 1.0), lambda scope: told.append(scope["path"])
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
            return (await client.post(f"/{size}", content=bytes(size))).status_code

    assert [asyncio.run(post(size)) for size in (100, 101)] == [200, 413]
    assert told == ["/101"]
