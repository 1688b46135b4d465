"""The exceptions that fedllm raises on purpose.

    FedllmError                  anything the user can act on; the command line prints it in one sentence
    ├── ConfigError              a configuration key, value or combination is wrong        (exit code 2)
    ├── DataError                a data file, column, row or partition is wrong            (exit code 2)
    ├── ModelError               a model, adapter or target module cannot be used          (exit code 2)
    ├── WireError                bytes from the network do not decode to what was asked
    │   └── CodecError           an encoded update is damaged, or an input cannot be encoded
    ├── RejectedReply            a decoded reply fails a gate (non-finite, wrong names, norm)
    ├── StoreError               the run folder cannot be read or written
    ├── RunFailed                the run cannot go on (quorum lost, update collapsed)      (exit code 1)
    └── Interrupted              somebody pressed Ctrl-C                                   (exit code 130)

Everything else that escapes is a bug in fedllm and keeps its traceback.
"""

from __future__ import annotations

import errno

__all__ = [
    "CodecError",
    "ConfigError",
    "DataError",
    "FedllmError",
    "Interrupted",
    "ModelError",
    "RejectedReply",
    "RunFailed",
    "StoreError",
    "WireError",
    "refused_by_the_system",
]


class FedllmError(Exception):
    """Base of all errors that say, in one sentence, what was wrong and what would be right."""

    exit_code = 1
    """What the command line ends with."""


class ConfigError(FedllmError):
    """A configuration key, value or combination is wrong."""

    exit_code = 2


class DataError(FedllmError):
    """A data file, column, row or partition is wrong."""

    exit_code = 2


class ModelError(FedllmError):
    """A model, adapter or target module cannot be used."""

    exit_code = 2


class WireError(FedllmError):
    """Bytes from the network do not decode to what the receiver asked for."""


class CodecError(WireError):
    """An encoded update is damaged, or an input cannot be encoded."""


class RejectedReply(FedllmError):
    """A reply decodes but fails a gate; the run goes on without it."""


class StoreError(FedllmError):
    """The run folder cannot be read or written."""


class RunFailed(FedllmError):
    """The run cannot go on."""


class Interrupted(FedllmError):
    """Somebody pressed Ctrl-C; says what is kept and how to go on."""

    exit_code = 130


_REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EFBIG,
}
"""What a system answers to good requests: no space, no quota, read-only, no folder, too long."""


def refused_by_the_system(error: OSError) -> StoreError | None:
    """Return what the system would not let us do as a sentence; None for what is nobody's mistake but ours.

    >>> str(refused_by_the_system(NotADirectoryError(errno.ENOTDIR, "Not a directory", "/dev/null/x")))
    'the system refuses /dev/null/x: Not a directory'
    """
    where = error.filename or "this"
    if isinstance(error, PermissionError):
        return StoreError(f"no permission for {where}: {error.strerror or error}")
    if error.errno in _REFUSALS:
        return StoreError(f"the system refuses {where}: {error.strerror or error}")
    return None
