"""What a server writes to the clients of a session, and they to it, as bytes.

keys      server: a nonce                              client: two public keys
shares    server: everybody's keys                     client: sealed shares for its neighbours, a proof
fit       server: who has shared, neighbours' proofs   client: masked values, elsewhere
agree     server: whose values came                    client: its signature under that
unmask    server: the same, signatures, sealed shares  client: one share of each neighbour

Clients of a simulation have no keys of their own: there is no step ``agree``, and no signature, among them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from fedllm.codecs.base import Reader
from fedllm.errors import WireError
from fedllm.secagg.keys import KEY_BYTES, TAG_BYTES
from fedllm.secagg.shamir import SHARE_BYTES

__all__ = [
    "NONCE_BYTES",
    "SEALED_BYTES",
    "Entry",
    "Masking",
    "Shares",
    "Unmasking",
    "entries",
    "roster",
    "survivors",
    "survivors_in",
]

NONCE_BYTES = 16
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
_MOST_CLIENTS, _MOST_PROOF = 1 << 20, 1 << 16


@dataclass(frozen=True)
class Entry:
    """A client's two public keys: shares are sealed to the one, masks agreed with the other."""

    seal: bytes
    mask: bytes

    def write(self) -> bytes:
        """Return both."""
        return self.seal + self.mask

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Invert :meth:`write`."""
        if len(data) != 2 * KEY_BYTES:
            raise WireError(f"two public keys are {2 * KEY_BYTES} bytes, got {len(data)}")
        return cls(data[:KEY_BYTES], data[KEY_BYTES:])


def roster(members: Mapping[int, Entry]) -> bytes:
    """Write everybody's keys, by ascending number."""
    return b"".join(struct.pack("<I", node) + members[node].write() for node in sorted(members))


def entries(data: bytes) -> dict[int, Entry]:
    """Invert :func:`roster`."""
    reader, found, last = Reader(data), dict[int, Entry](), -1
    for _ in range(len(data) // (4 + 2 * KEY_BYTES)):
        node = reader.number("number of a client")
        if node <= last:
            raise WireError("a list of keys is not in ascending order")
        last = node
        found[node] = Entry.read(bytes(reader.take(2 * KEY_BYTES, "keys")))
    reader.finish()
    return found


@dataclass(frozen=True)
class Shares:
    """A client's shares.

    Attributes:
        commitment: SHA-256 of its self-mask's seed.
        sealed: a share of that seed and one of its mask key, for each neighbour in ascending order.
        proof: of whose keys the list holds under its number; empty where nodes have no keys of their own.
    """

    commitment: bytes
    sealed: Sequence[bytes]
    proof: bytes

    def write(self) -> bytes:
        """Return all of it."""
        return b"".join([self.commitment, *self.sealed, self.proof])

    @classmethod
    def read(cls, data: bytes, neighbours: int) -> Self:
        """Invert :meth:`write`."""
        reader = Reader(data)
        commitment = bytes(reader.take(32, "commitment"))
        sealed = [bytes(reader.take(SEALED_BYTES, "shares")) for _ in range(neighbours)]
        rest = len(data) - 32 - neighbours * SEALED_BYTES
        if rest > _MOST_PROOF:
            raise WireError(f"a proof of {rest} bytes is none")
        return cls(commitment, sealed, bytes(reader.take(rest, "proof")))


@dataclass(frozen=True)
class Masking:
    """What a client needs to mask its values.

    Attributes:
        sharers: who has shared, ascending.
        proofs: of its neighbours among them, ascending.
        most: texts that one client counts for at most.
        weight: that all sharers together have at most, which the ring must hold.
    """

    sharers: tuple[int, ...]
    proofs: Sequence[bytes]
    most: int
    weight: int

    def write(self) -> bytes:
        """Return all of it."""
        head = struct.pack("<IQ", self.most, self.weight)
        return head + _numbers(self.sharers) + b"".join(struct.pack("<I", len(p)) + p for p in self.proofs)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Invert :meth:`write`."""
        reader = Reader(data)
        most, weight = struct.unpack("<IQ", reader.take(12, "weights"))
        sharers, proofs, left = _read_numbers(reader), [], len(data) - 16
        left -= 4 * len(sharers)
        while left > 0:
            size = reader.number("length of a proof")
            proofs.append(bytes(reader.take(size, "proof")))
            left -= 4 + size
        reader.finish()
        return cls(sharers, proofs, most, weight)


@dataclass(frozen=True)
class Unmasking:
    """Whose shares a client is asked for, and what they sealed for it.

    Attributes:
        survivors: whose masked values came, ascending.
        sealed: shares of its neighbours among the sharers, ascending.
        agreed: signatures of its neighbours under the survivors, by number, ascending.
    """

    survivors: tuple[int, ...]
    sealed: Sequence[bytes]
    agreed: Mapping[int, bytes] = field(default_factory=dict)

    def write(self) -> bytes:
        """Return all of it."""
        agreed = b"".join(struct.pack("<H", len(one)) + one for one in self.agreed.values())
        return b"".join([survivors(self.survivors), _numbers(tuple(self.agreed)), agreed, *self.sealed])

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Invert :meth:`write`."""
        reader = Reader(data)
        survivors = _read_numbers(reader)
        agreed, left = dict[int, bytes](), len(data) - 8 - 4 * len(survivors)
        for node in _read_numbers(reader):
            size = int.from_bytes(reader.take(2, "length of a signature"), "little")
            agreed[node] = bytes(reader.take(size, "signature"))
            left -= 6 + size
        sealed = [bytes(reader.take(SEALED_BYTES, "shares")) for _ in range(left // SEALED_BYTES)]
        reader.finish()
        return cls(survivors, sealed, agreed)


def survivors(numbers: Sequence[int]) -> bytes:
    """Write whose masked values came, ascending: what each of them signs before shares are revealed."""
    return _numbers(numbers)


def survivors_in(data: bytes) -> tuple[int, ...]:
    """Invert :func:`survivors`."""
    reader = Reader(data)
    found = _read_numbers(reader)
    reader.finish()
    return found


def _numbers(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(numbers)}I", len(numbers), *numbers)


def _read_numbers(reader: Reader) -> tuple[int, ...]:
    count = reader.number("length of a list")
    if count > _MOST_CLIENTS:
        raise WireError(f"a list of {count} clients is none")
    found = struct.unpack(f"<{count}I", reader.take(4 * count, "list of clients"))
    if list(found) != sorted(set(found)):
        raise WireError("a list of clients is not in ascending order")
    return found
