"""What a worker under test does with a request."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import struct
import time
from pathlib import Path
from unittest import mock

from flwr.app import Array, ArrayRecord, RecordDict

from fedllm import wire
from fedllm.errors import DataError

SLOW_SECONDS = 80.0


def play(request: bytes) -> bytes:
    """Do what the request says: ``echo``, ``pid``, ``sleep SECONDS``, ``eat BYTES``, ``die FILE``, ..."""
    word, _, rest = request.partition(b" ")
    if word == b"pid":
        return str(os.getpid()).encode()
    if word == b"sleep":
        time.sleep(float(rest))
    if word == b"eat":
        return str(len(bytearray(int(rest)))).encode()
    if word == b"die":
        # Once: the file remembers it, as a crash that does not come back.
        marker = Path(rest.decode())
        if not marker.exists():
            marker.touch()
            os._exit(9)
    if word == b"crash":
        os._exit(9)
    if word == b"data":
        raise DataError("the column text is missing")
    if word == b"bug":
        raise KeyError("nobody foresaw this")
    return request


def hostile(request: bytes) -> bytes:
    """Train honestly, then misbehave in a way of its own each round; a real node could send any of it."""
    from client.worker import answer_bytes

    instruction = wire.unpack_instruction(wire.decode(request))
    if instruction.kind != "fit":
        return answer_bytes(request)
    if instruction.round == 1:
        return os.urandom(4096)
    if instruction.round == 6:
        with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            return answer_bytes(request)
    reply = wire.unpack_reply(wire.decode(answer_bytes(request)))
    payload = reply.payload
    if instruction.round == 2:
        payload = struct.pack("<f", math.nan) * (len(payload) // 4)
    if instruction.round == 3:
        payload = payload[:-8]
    if instruction.round == 4:
        return wire.encode(_claim(10_000_000_000))
    if instruction.round == 5:
        time.sleep(SLOW_SECONDS)
    return wire.encode(wire.pack_reply(dataclasses.replace(reply, payload=payload)))


def _claim(size: int) -> RecordDict:
    """A reply whose array claims more bytes than it has."""
    content = wire.pack_reply(wire.Reply(4, 0, 10, {}, payload=b"few"))
    content["p"] = ArrayRecord({"x": Array(dtype="uint8", shape=(size,), stype="raw", data=b"few")})
    return content
