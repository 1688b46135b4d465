"""Whose keys a session's keys are: nodes sign with their bundle's key, peers check the certificate.

The certificate is of the federation's authority and names the node by its number, so that a server which
does not hold the authority's key cannot put itself in a node's place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedllm.certificates import Holder, key_in, point, require_signed
from fedllm.errors import WireError

__all__ = ["Certified", "Identity", "Unproven", "require_stated"]

_CONTEXT = b"fedllm secagg keys 1\0"
"""What is signed begins so: a signature under anything else of this key is none of a list."""


class Identity(Protocol):
    """A node's own key, and what it takes to check its peers'."""

    @property
    def certified(self) -> bool:
        """Whether it has a key, and peers that have some."""
        ...

    def prove(self, statement: bytes) -> bytes:
        """Return a proof that this node states something: a signature, and whose it is."""
        ...

    def check(self, node: int, statement: bytes, proof: bytes) -> bytes:
        """Return that node's public key; raise ``WireError`` unless it states it."""
        ...

    def admit(self, nodes: Iterable[int]) -> None:
        """Raise ``WireError`` unless this node takes these for peers."""
        ...

    def state(self, statement: bytes) -> bytes:
        """Return a signature for peers that know whose it is."""
        ...

    def stated(self, key: bytes, statement: bytes, signature: bytes) -> bool:
        """Whether the holder of a key, as :meth:`check` returned it, states something."""
        ...


class Unproven:
    """Clients of a simulation: all in one hand, and without keys of their own."""

    certified = False

    def prove(self, statement: bytes) -> bytes:
        """Return nothing."""
        return b""

    def check(self, node: int, statement: bytes, proof: bytes) -> bytes:
        """Believe it."""
        return b""

    def admit(self, nodes: Iterable[int]) -> None:
        """Take whoever comes."""

    def state(self, statement: bytes) -> bytes:
        """Return nothing."""
        return b""

    def stated(self, key: bytes, statement: bytes, signature: bytes) -> bool:
        """Believe it."""
        return True


@dataclass(frozen=True)
class Certified(Holder):
    """A node of a federation; read from its bundle.

    Attributes:
        peers: points of the public keys of those that it takes for peers, by number; None takes all whom the
            authority has certified.
    """

    peers: Mapping[int, bytes] | None = None
    certified: ClassVar[bool] = True

    def prove(self, statement: bytes) -> bytes:
        """Sign, and show the certificate."""
        signature = self.state(statement)
        return struct.pack("<H", len(signature)) + signature + self.shown

    def check(self, node: int, statement: bytes, proof: bytes) -> bytes:
        """Check signature, certificate and number; return the public key's point."""
        if len(proof) < 2:
            raise WireError(f"client {node} does not prove whose keys are shown under its number")
        signature, shown = _parts(proof)
        try:
            key = key_in(shown, self.authority, node)
            require_signed(key, _CONTEXT + statement, signature)
        except WireError as error:
            raise WireError(
                f"the keys shown under the number of client {node} are not proven to be its own: {error}"
            ) from error
        if self.peers is not None and self.peers.get(node) != point(key):
            raise WireError(f"client {node} shows another certificate than the one of it in --peers")
        return point(key)

    def admit(self, nodes: Iterable[int]) -> None:
        """Take those of the roster, where there is one."""
        strangers = [] if self.peers is None else sorted(set(nodes) - self.peers.keys())
        if strangers:
            raise WireError(
                f"this device sits in a sum with those in its --peers alone, and client {strangers[0]} is "
                "none of them"
            )

    def state(self, statement: bytes) -> bytes:
        """Sign."""
        return self.sign(_CONTEXT + statement)

    def stated(self, key: bytes, statement: bytes, signature: bytes) -> bool:
        """Check a signature by a peer's point."""
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), key)
        try:
            require_signed(public, _CONTEXT + statement, signature)
        except WireError:
            return False
        return True


def require_stated(proof: bytes, statement: bytes, signature: bytes) -> None:
    """Check a signature by the key of an earlier proof, whoever has certified it: peers look at that.

    Raises:
        WireError: it is another's.
    """
    try:
        key = x509.load_der_x509_certificate(_parts(proof)[1]).public_key()
    except ValueError as error:
        raise WireError(f"it has proven its keys by no certificate ({error})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise WireError("it has proven its keys by a key of another kind")
    require_signed(key, _CONTEXT + statement, signature)


def _parts(proof: bytes) -> tuple[bytes, bytes]:
    """Return signature and certificate of a proof."""
    size = 2 + int.from_bytes(proof[:2], "little")
    return proof[2:size], proof[size:]
