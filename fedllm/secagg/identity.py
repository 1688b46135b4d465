"""Whose keys a session's keys are: nodes sign with their bundle's key, peers check the certificate.

The certificate is of the federation's authority and names the node by its number, so that a server which
does not hold the authority's key cannot put itself in a node's place.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from fedllm.certificates import Holder, key_in, require_signed
from fedllm.errors import WireError

__all__ = ["Certified", "Identity", "Unproven"]

_CONTEXT = b"fedllm secagg keys 1\0"
"""What is signed begins so: a signature under anything else of this key is none of a list."""


class Identity(Protocol):
    """A node's own key, and what it takes to check its peers'."""

    def prove(self, statement: bytes) -> bytes:
        """Return a proof that this node states something."""
        ...

    def check(self, node: int, statement: bytes, proof: bytes) -> None:
        """Raise ``WireError`` unless that node states it."""
        ...


class Unproven:
    """Clients of a simulation: all in one hand, and without keys of their own."""

    def prove(self, statement: bytes) -> bytes:
        """Return nothing."""
        return b""

    def check(self, node: int, statement: bytes, proof: bytes) -> None:
        """Believe it."""


@dataclass(frozen=True)
class Certified(Holder):
    """A node of a federation; read from its bundle."""

    def prove(self, statement: bytes) -> bytes:
        """Sign, and show the certificate."""
        signature = self.sign(_CONTEXT + statement)
        return struct.pack("<H", len(signature)) + signature + self.shown

    def check(self, node: int, statement: bytes, proof: bytes) -> None:
        """Check signature, certificate and number."""
        if len(proof) < 2:
            raise WireError(f"client {node} does not prove whose keys are shown under its number")
        size = 2 + int.from_bytes(proof[:2], "little")
        try:
            key = key_in(proof[size:], self.authority, node)
            require_signed(key, _CONTEXT + statement, proof[2:size])
        except WireError as error:
            raise WireError(
                f"the keys shown under the number of client {node} are not proven to be its own: {error}"
            ) from error
