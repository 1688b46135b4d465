"""Keys of one session: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20-Poly1305 (RFC 8439)."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedllm.errors import WireError

__all__ = ["KEY_BYTES", "TAG_BYTES", "agree", "derive", "opened", "private_key", "public_of", "sealed"]

KEY_BYTES, TAG_BYTES = 32, 16
_NONCE = bytes(12)


def private_key() -> bytes:
    """Draw a private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> bytes:
    """Return the public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """Return the key that two share for one purpose.

    Args:
        private: one's own, 32 bytes.
        public: the other's, 32 bytes.
        purpose: what it is for, who the two are and in which session: another one gives another key.

    Raises:
        WireError: the other's is no key, such as one that gives everybody the same.

    >>> one, other = private_key(), private_key()
    >>> agree(one, public_of(other), b"x") == agree(other, public_of(one), b"x")
    True
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise WireError(f"a peer's key is none that can be agreed with: {error}") from error
    return derive(shared, purpose)


def derive(secret: bytes, purpose: bytes) -> bytes:
    """Return a key for one purpose of a secret."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=b"fedllm secagg 1\0" + purpose).derive(secret)


def sealed(key: bytes, content: bytes) -> bytes:
    """Encrypt with a key that encrypts nothing else: the nonce is zero."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, None)


def opened(key: bytes, content: bytes) -> bytes | None:
    """Invert :func:`sealed`; None for what was not sealed with this key."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, content, None)
    except InvalidTag:
        return None
