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

from fedllm.codecs.base import _HEADER, VERSION, _checksum
from fedllm.config import RunConfig
from fedllm.errors import DataError
from fedllm.protocol import wire

MOMENT_SECONDS = 1.0
BEHAVIOUR, WORKING = "behaviour", "working"
"""Files in a node's state folder: what a test asks for, and that the node trains."""


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


def behave(request: bytes) -> bytes:
    """Train as a file in the state folder says: ``unhurried``, ``hostile``, or honestly without one."""
    from client.worker import answer_bytes

    content = wire.decode(request)
    instruction = wire.unpack_instruction(content)
    state = Path(str(content["place"]["folder"]))
    behaviour = state / BEHAVIOUR
    if instruction.kind != "fit" or not behaviour.exists():
        return answer_bytes(request)
    if behaviour.read_text() == "hostile":
        return hostile(request, instruction, RunConfig.from_json(str(content["config"]["json"])))
    # A moment in which a test can pull the plug.
    (state / WORKING).touch()
    time.sleep(MOMENT_SECONDS)
    answered = answer_bytes(request)
    (state / WORKING).unlink()
    return answered


def hostile(request: bytes, instruction: wire.Instruction, config: RunConfig) -> bytes:
    """Train honestly, then misbehave in a way of its own each round; a real node could send any of it."""
    from client.worker import answer_bytes

    if instruction.round == 1:
        return os.urandom(4096)
    if instruction.round == 6:
        with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            return answer_bytes(request)
    reply = wire.unpack_reply(wire.decode(answer_bytes(request)))
    payload = reply.payload
    if instruction.round == 2:
        payload = _poisoned(payload)
    if instruction.round == 3:
        payload = payload[:-8]
    if instruction.round == 4:
        return wire.encode(_claim(2_000_000_000))
    if instruction.round == 5:
        time.sleep(1.2 * config.server.deadline_s)
    return wire.encode(wire.pack_reply(dataclasses.replace(reply, payload=payload)))


def _poisoned(payload: bytes) -> bytes:
    """Make the first scale NaN, and the checksum right again: no codec would write that."""
    _, identity, _ = _HEADER.unpack_from(payload)
    flag, scales = payload[_HEADER.size : _HEADER.size + 1], payload[_HEADER.size + 1 :]
    body = flag + struct.pack("<f", math.nan) + scales[4:]
    return _HEADER.pack(VERSION, identity, _checksum(identity, [body])) + body


def _claim(values: int) -> RecordDict:
    """A reply whose array claims eight bytes for each of so many values, and has three."""
    content = wire.pack_reply(wire.Reply(4, 0, 10, {}, payload=b"few"))
    content["p"] = ArrayRecord({"x": Array(dtype="float64", shape=(values,), stype="raw", data=b"few")})
    return content
