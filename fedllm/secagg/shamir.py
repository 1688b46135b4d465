"""Secret sharing (Shamir, CACM 1979): any t of the shares give the secret, fewer say nothing of it.

A secret is the constant term of a random polynomial of degree t - 1 over the integers modulo 2^256 + 297,
the least prime above all secrets; the share of holder x is its value at x.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedllm.errors import WireError

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "join", "split"]

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, holders: Sequence[int]) -> dict[int, bytes]:
    """Return a share of a secret for each holder.

    Args:
        secret: 32 bytes.
        threshold: shares that give the secret back, from 1 to the number of holders.
        holders: positive and distinct; what is drawn at random comes from the operating system.

    >>> shares = split(b"s" * 32, 2, [1, 2, 3])
    >>> join({1: shares[1], 3: shares[3]})
    b'ssssssssssssssssssssssssssssssss'
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(holders):
        raise ValueError(f"{len(secret)} bytes cannot be shared by {threshold} of {len(holders)}")
    if min(holders) < 1 or len(set(holders)) != len(holders):
        raise ValueError("holders must be positive and distinct")
    terms = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {holder: _at(terms, holder).to_bytes(SHARE_BYTES) for holder in holders}


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of as many shares as its threshold says; of fewer something that is not it.

    Args:
        shares: by holder.

    Raises:
        WireError: a share is none, or what they give is no secret.
    """
    numbers = [int.from_bytes(share) for share in shares.values()]
    if any(number >= PRIME for number in numbers):
        raise WireError("a share of a secret is out of its range")
    weights = _weights(tuple(shares))
    secret = sum(number * weight for number, weight in zip(numbers, weights, strict=True)) % PRIME
    if secret >= 1 << 8 * SECRET_BYTES:
        raise WireError("shares do not belong together: they give no secret")
    return secret.to_bytes(SECRET_BYTES)


def _at(terms: Sequence[int], x: int) -> int:
    value = 0
    for term in reversed(terms):
        value = (value * x + term) % PRIME
    return value


@lru_cache(maxsize=256)
def _weights(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights of the values at ``holders`` in the value at 0."""
    found = []
    for x in holders:
        above = below = 1
        for other in holders:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(found)
