"""What of an error, and of a log, may leave a device: nothing that was read from its texts.

An error over a file quotes what stands in it, so that its owner can mend it. A server that may name columns,
paths and tasks could have a device quote one text after the other: what is quoted stays in the device's log.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from fedllm.errors import DataError, FedllmError

__all__ = ["KEPT", "log_to", "reason"]

KEPT = "kept here: "
"""Begins the lines of a device's log that do not travel."""
WORKER = "worker: "
"""Begins those that may."""
_SENT = ("fedllm.worker", "strategies")
"""Loggers whose lines hold counts, and nothing of a text."""

_log = logging.getLogger("fedllm.kept")


def reason(error: BaseException) -> str:
    """Return why this device cannot do what it was asked, as its server may know it; logs the rest here.

    >>> reason(ValueError("could not convert string to float: 'Jane Doe, fever'"))
    "ValueError, of which the device's own log says more"
    """
    if isinstance(error, DataError):
        _log.error("%s", error)
        return (
            "this device's texts are not what the run asks for (data.text, data.label, data.columns, "
            "model.task); the device's own log says where"
        )
    if isinstance(error, FedllmError):
        return str(error) or repr(error)
    _log.error("%s", error, exc_info=error)
    return f"{type(error).__name__}, of which the device's own log says more"


class _Marked(logging.Formatter):
    """Begins each line with where it may go; all but the first of a record stay."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, line by line."""
        sent = any(record.name == name or record.name.startswith(f"{name}.") for name in _SENT)
        first, *rest = super().format(record).splitlines() or [""]
        return "\n".join([(WORKER if sent else KEPT) + first, *(KEPT + line for line in rest)])


def log_to(stream: TextIO = sys.stdout) -> None:
    """Have all loggers of this process write to a stream, their lines marked."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Marked())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
