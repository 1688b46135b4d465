"""Half-open requests: whoever never ends a request is cut off, whoever waits for an answer is not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from server import patience


async def _answer(request: Request) -> PlainTextResponse:
    body = await request.body()
    await asyncio.sleep(2 * patience.REQUEST_S)
    return PlainTextResponse(f"{len(body)} bytes")


@contextlib.contextmanager
def _serving(protocol: type[patience.Impatient], *said: bytes) -> Iterator[tuple[int, list[socket.socket]]]:
    """Serve on a port; what clients ``said`` lies there before the server looks, however busy the machine."""
    app = Starlette(routes=[Route("/", _answer, methods=["GET", "POST"])])
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        port = listening.getsockname()[1]
        clients = [stack.enter_context(_saying(port, text)) for text in said]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield port, clients
        finally:
            server.should_exit = True
            thread.join()


def _saying(port: int, text: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(text)
    return connection


def _answer_to(connection: socket.socket) -> bytes:
    """Return what the server says, which may come in pieces; nothing where it hangs up."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while not said.endswith(b" bytes") and (piece := connection.recv(4096)):
            said += piece
    return said


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "REQUEST_S", 0.1)


HALF = [b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab"]


@pytest.mark.slow
def test_half_a_request_is_cut_off() -> None:
    with _serving(patience.Impatient, *HALF) as (_, clients):
        assert [_answer_to(client) for client in clients] == [b"", b"", b""]


@pytest.mark.slow
def test_a_slow_answer_is_waited_for() -> None:
    whole = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab"
    with _serving(patience.Impatient, whole) as (_, (client,)):
        assert _answer_to(client).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_only_the_head_of_a_request_is_hurried_where_bodies_have_a_time_of_their_own() -> None:
    """As at the SuperLink: half a head is cut off, half a body is waited for."""
    nothing, half, head = *HALF[:2], b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n"
    with _serving(patience.PromptHeads, nothing, half, head) as (_, (silent, slow, patient)):
        assert _answer_to(silent) == _answer_to(slow) == b""  # the time is over
        for part in (b"a", b"b", b"c"):
            patient.sendall(part)
        assert b"3 bytes" in _answer_to(patient)


@pytest.mark.slow
def test_a_head_that_trickles_is_cut_off() -> None:
    with _serving(patience.PromptHeads) as (port, _), _saying(port, b"GET / HTTP/1.1\r\n") as connection:
        cut_off = False
        while not cut_off:
            time.sleep(0.05)
            try:
                connection.sendall(b"X")
            except OSError:
                cut_off = True
