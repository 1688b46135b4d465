"""Coders: integer codes to bytes, lossless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.codecs.base import Buffer, Reader
from fedllm.codecs.bits import Codes, pack_codes, packed_bytes, unpack_codes

__all__ = ["Packed"]


@dataclass(frozen=True)
class Packed:
    """The coder that goes without saying: every code takes the bits its alphabet needs."""

    def encode(self, codes: Codes, alphabet: int) -> Sequence[Buffer]:
        """Return packed codes."""
        return [pack_codes(codes, _width(alphabet))]

    def decode(self, reader: Reader, count: int, alphabet: int) -> Codes:
        """Return ``count`` codes."""
        bits = _width(alphabet)
        return unpack_codes(reader.take(packed_bytes(count, bits), "codes"), count, bits)


def _width(alphabet: int) -> int:
    return (alphabet - 1).bit_length()
