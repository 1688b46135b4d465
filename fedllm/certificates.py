"""Whose a signature is: each node has a key, and a certificate in which its federation's authority names it.

A bundle holds both. Whoever has the authority's certificate can tell what a node has signed from what anybody
else has, the server among them: it does not hold nodes' keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from cryptography.x509.oid import NameOID

from fedllm.errors import ConfigError, WireError

__all__ = [
    "CERTIFICATE",
    "MOST_CERTIFICATE",
    "MOST_SIGNATURE",
    "Holder",
    "key_in",
    "peers_in",
    "point",
    "reply_statement",
    "require_signed",
    "subject",
]

CERTIFICATE = "node.pem"
"""In a node's bundle."""
MOST_CERTIFICATE, MOST_SIGNATURE = 4096, 256
"""Bytes that one has at most, DER; the federation's own have 500 and 104."""

_SIGNS = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True)
class Holder:
    """A node of a federation, which can sign.

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
                f"{error.filename} is missing, which proves what this node signs: an older fedllm made this "
                "bundle; have the operator make one with fedllm provision --add-node"
            ) from error
        except (OSError, ValueError, TypeError, InvalidSignature) as error:
            raise ConfigError(f"{bundle} proves nobody's keys ({error}); copy the bundle again") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{bundle / CERTIFICATE} is not of node.key beside it; copy the bundle again")
        return cls(key, certificate, authority)

    @property
    def shown(self) -> bytes:
        """The certificate as it is shown to others, DER."""
        return self.certificate.public_bytes(Encoding.DER)

    def sign(self, statement: bytes) -> bytes:
        """Return a signature (ECDSA with SHA-256); a statement begins with what it is for."""
        return self.key.sign(statement, _SIGNS)


def subject(node: int) -> x509.Name:
    """Return what a node's certificate calls it."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedllm node {node}")])


def key_in(shown: bytes, authority: x509.Certificate, node: int) -> ec.EllipticCurvePublicKey:
    """Return the public key in a node's certificate.

    Args:
        shown: the certificate, DER.
        authority: which must have made it.
        node: the number that it must name.

    Raises:
        WireError: says what of that does not hold.
    """
    try:
        certificate = x509.load_der_x509_certificate(shown)
        certificate.verify_directly_issued_by(authority)
        key = certificate.public_key()
    except (ValueError, TypeError, InvalidSignature) as error:
        raise WireError(f"its certificate is not the authority's ({error or 'signed by another'})") from error
    if certificate.subject != subject(node) or not isinstance(key, ec.EllipticCurvePublicKey):
        raise WireError("its certificate is of somebody else")
    return key


def peers_in(path: Path, authority: x509.Certificate) -> dict[int, bytes]:
    """Read a roster: certificates of nodes, as in their bundles, one after the other in one file.

    Args:
        path: of the file, PEM.
        authority: which must have made all of them.

    Returns:
        The point of each node's public key, by its number.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    found: dict[int, bytes] = {}
    try:
        for certificate in x509.load_pem_x509_certificates(path.read_bytes()):
            node = _number(certificate)
            found[node] = point(key_in(certificate.public_bytes(Encoding.DER), authority, node))
    except OSError as error:
        raise ConfigError(f"--peers {path} cannot be read: {error.strerror}") from error
    except (ValueError, WireError) as error:
        raise ConfigError(
            f"--peers {path} is no list of certificates of this federation's nodes ({error}); put their "
            f"{CERTIFICATE} into it, one after the other"
        ) from error
    return found


def _number(certificate: x509.Certificate) -> int:
    """Return the number of the node that a certificate names; raises ``ValueError`` where it names none."""
    name = certificate.subject.rfc4514_string()
    number = name.removeprefix("CN=fedllm node ")
    if not number.isdecimal() or certificate.subject != subject(int(number)):
        raise ValueError(f"{name} is no node")
    return int(number)


def require_signed(key: ec.EllipticCurvePublicKey, statement: bytes, signature: bytes) -> None:
    """Raise ``WireError`` unless a signature is that key's under a statement."""
    try:
        key.verify(signature, statement, _SIGNS)
    except InvalidSignature as error:
        raise WireError("the signature is another") from error


def point(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key in the fewest bytes: its point, compressed."""
    return key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def reply_statement(kind: str, digest: str) -> bytes:
    r"""Return what a node signs of a reply.

    Args:
        kind: of the exchange that it answers: two in a round have the same place where one follows another.
        digest: see :func:`fedllm.protocol.wire.digest`; it holds run, client, round and exchange.

    >>> reply_statement("fit", "ab")
    b'fedllm reply 1\x00fit ab'
    """
    return b"fedllm reply 1\0" + f"{kind} {digest}".encode()
