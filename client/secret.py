"""A client's own secret in a run: all noise that it adds comes of it, the same when it is asked again."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path
from secrets import token_bytes
from typing import Self

from client.node import NodeContext
from fedllm.errors import StoreError
from fedllm.runs.durable import replace_file

__all__ = ["Secret"]

_BYTES = 32


@dataclass(frozen=True)
class Secret:
    """32 bytes that only this client's folder holds.

    Whoever reads them can take the noise off what the client has sent.
    """

    _value: bytes

    @classmethod
    def of(cls, place: NodeContext, run: str) -> Self:
        """Read a client's secret of a run; the first time it comes from the operating system.

        Raises:
            StoreError: the file is damaged.
        """
        path = Path(place.folder) / run / "noise.key"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(path, token_bytes(_BYTES), mode=0o600)
        value = path.read_bytes()
        if len(value) != _BYTES:
            raise StoreError(f"{path} is damaged: delete it, and this client's noise is another from then on")
        return cls(value)

    def key(self, *purpose: str | int | bytes) -> bytes:
        """Return the key of 32 bytes for one purpose: another purpose has another."""
        named = "/".join(part.hex() if isinstance(part, bytes) else str(part) for part in purpose)
        return hmac.digest(self._value, named.encode(), "sha256")
