"""What a worker under test does with a request."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fedllm.errors import DataError


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
