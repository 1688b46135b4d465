"""What ties a node's number to its key in a bundle, so that a device notices a bundle that was changed."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

__all__ = ["seal"]


def seal(node: int, key: ec.EllipticCurvePublicKey) -> str:
    """Return the seal of a number and a public key.

    It needs no secret, so whoever has the bundle can make another: it finds mistakes. That nobody takes
    another node's number is the server's care, which knows whose key it is.

    >>> key = ec.derive_private_key(7, ec.SECP384R1()).public_key()
    >>> seal(1, key) == seal(1, key), seal(1, key) == seal(2, key), len(seal(1, key))
    (True, False, 32)
    """
    public = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return hashlib.sha256(b"%d %s" % (node, public)).hexdigest()[:32]
