"""Whose keys a session's keys are: nodes sign with their bundle's key, peers check the certificate.

The certificate is of the federation's authority and names the node by its number, so that a server which
does not hold the authority's key cannot put itself in a node's place.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_private_key
from cryptography.x509.oid import NameOID

from fedllm.errors import ConfigError, WireError

__all__ = ["CERTIFICATE", "Certified", "Identity", "Unproven", "subject"]

CERTIFICATE = "node.pem"
"""In a node's bundle."""

_SIGNS = ec.ECDSA(hashes.SHA256())
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
class Certified:
    """A node of a federation.

    Attributes:
        key: its own.
        certificate: which the authority made for that key and the node's number.
        authority: its certificate.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    authority: x509.Certificate

    @classmethod
    def read(cls, bundle: Path) -> Self:
        """Read a node's bundle.

        Raises:
            ConfigError: it holds no certificate, or what it holds does not belong together.
        """
        try:
            key = load_ssh_private_key((bundle / "node.key").read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((bundle / CERTIFICATE).read_bytes())
            authority = x509.load_pem_x509_certificate((bundle / "ca.pem").read_bytes())
            certificate.verify_directly_issued_by(authority)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{error.filename} is missing, which proves this node's keys under secure aggregation: an "
                "older fedllm made this bundle; have the operator make one with fedllm provision --add-node"
            ) from error
        except (OSError, ValueError, TypeError, InvalidSignature) as error:
            raise ConfigError(f"{bundle} proves nobody's keys ({error}); copy the bundle again") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{bundle / CERTIFICATE} is not of node.key beside it; copy the bundle again")
        return cls(key, certificate, authority)

    def prove(self, statement: bytes) -> bytes:
        """Sign, and show the certificate."""
        signature = self.key.sign(_CONTEXT + statement, _SIGNS)
        return struct.pack("<H", len(signature)) + signature + self.certificate.public_bytes(Encoding.DER)

    def check(self, node: int, statement: bytes, proof: bytes) -> None:
        """Check signature, certificate and number."""
        if len(proof) < 2:
            raise WireError(f"client {node} does not prove whose keys are shown under its number")
        size = 2 + int.from_bytes(proof[:2], "little")
        try:
            shown = x509.load_der_x509_certificate(proof[size:])
            shown.verify_directly_issued_by(self.authority)
            key = shown.public_key()
            if shown.subject != subject(node) or not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError("its certificate is of somebody else")
            key.verify(proof[2:size], _CONTEXT + statement, _SIGNS)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise WireError(
                f"the keys shown under the number of client {node} are not proven to be its own: "
                f"{str(error) or 'the signature is another'}"
            ) from error


def subject(node: int) -> x509.Name:
    """Return what a node's certificate calls it."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedllm node {node}")])
