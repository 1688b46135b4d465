"""uvicorn's HTTP protocol with an end to its patience: a request that does not arrive is cut off."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["REQUEST_S", "Impatient", "PromptHeads"]

REQUEST_S = 30.0
"""Seconds for a request, head and body, to arrive; bodies have a megabyte at most."""


class Impatient(HttpToolsProtocol):
    """Closes connections whose request takes longer than :data:`REQUEST_S` to arrive."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        """Start to wait for the rest of a request."""
        super().on_message_begin()
        self._wait()

    def on_message_complete(self) -> None:
        """Wait no more: the answer takes as long as it takes."""
        self._arrived()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        """Wait no more: pages stay open."""
        self._arrived()
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._arrived()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._arrived()
        self._timer = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _arrived(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class PromptHeads(Impatient):
    """The same for the head of a request alone: what is behind has its own patience with bodies."""

    def on_headers_complete(self) -> None:
        """Wait no more for this request."""
        self._arrived()
        super().on_headers_complete()
