"""Packing of small integer codes into bytes: a 4-bit code is 4 bits on the wire.

Codes of a width that does not divide eight are split into bit fields that do (5 = 4 + 1). A field is packed
by planes - code ``i`` shares its byte with codes ``i + n``, ``i + 2n``, ... - so that every operation runs
over contiguous memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Codes", "pack_codes", "packed_bytes", "unpack_codes"]

CHUNK = 1 << 15
"""Bytes that go through all steps at once, so that they stay in cache."""

Codes = npt.NDArray[np.uint8]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take.

    >>> packed_bytes(1000, 4), packed_bytes(9, 1), packed_bytes(8, 5)
    (500, 2, 5)
    """
    return sum(-(-count * field // 8) for field in _fields(bits))


def pack_codes(codes: Codes, bits: int) -> bytes | memoryview:
    """Pack codes in [0, 2**bits), 1 <= bits <= 8.

    >>> pack_codes(np.array([1, 2, 3, 4], np.uint8), 4).hex()
    '3142'
    """
    if bits == 8:
        return codes.data
    if bits in (1, 2, 4):
        return _pack_field(codes, bits)
    parts, shift = [], 0
    for field in _fields(bits):
        parts.append(_pack_field(codes >> np.uint8(shift) & np.uint8((1 << field) - 1), field))
        shift += field
    return parts[0] if len(parts) == 1 else b"".join(parts)


def unpack_codes(data: bytes | memoryview, count: int, bits: int) -> Codes:
    """Invert :func:`pack_codes`; ``data`` must hold ``packed_bytes(count, bits)`` bytes.

    >>> unpack_codes(pack_codes(np.arange(7, dtype=np.uint8), 3), 7, 3).tolist()
    [0, 1, 2, 3, 4, 5, 6]
    """
    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        return raw
    if bits in (1, 2, 4):
        return _unpack_field(raw, bits)[:count]
    codes = np.zeros(count, np.uint8)
    shift = start = 0
    for field in _fields(bits):
        size = -(-count * field // 8)
        part = _unpack_field(raw[start : start + size], field)[:count]
        codes |= part << np.uint8(shift)
        shift += field
        start += size
    return codes


def _fields(bits: int) -> list[int]:
    return [field for field in (8, 4, 2, 1) if bits & field]


def _pack_field(codes: Codes, field: int) -> memoryview:
    if field == 1:
        return np.packbits(codes, bitorder="little").data
    planes = 8 // field
    size = -(-codes.size // planes)
    packed = codes[:size].copy()
    for start in range(0, size, CHUNK):
        part = packed[start : start + CHUNK]
        for plane in range(1, planes):
            piece = codes[plane * size + start : min(plane * size + start + CHUNK, (plane + 1) * size)]
            part[: piece.size] |= piece << np.uint8(field * plane)
    return packed.data


def _unpack_field(raw: Codes, field: int) -> Codes:
    if field == 1:
        return np.unpackbits(raw, bitorder="little")
    mask = np.uint8((1 << field) - 1)
    codes = np.empty((8 // field, raw.size), np.uint8)
    for start in range(0, raw.size, CHUNK):
        part = slice(start, start + CHUNK)
        for plane, row in enumerate(codes):
            np.right_shift(raw[part], np.uint8(field * plane), out=row[part])
            np.bitwise_and(row[part], mask, out=row[part])
    return codes.reshape(-1)
