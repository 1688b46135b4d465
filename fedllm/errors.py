"""The exceptions that fedllm raises on purpose.

    FedllmError                  anything the user can act on; the command line prints it in one sentence
    ├── ConfigError              a configuration key, value or combination is wrong        (exit code 2)
    ├── DataError                a data file, column, row or partition is wrong            (exit code 2)
    ├── ModelError               a model, adapter or target module cannot be used          (exit code 2)
    ├── WireError                bytes from the network do not decode to what was asked
    │   └── CodecError           an encoded update is damaged, or an input cannot be encoded
    ├── RejectedReply            a decoded reply fails a gate (non-finite, wrong names, norm)
    ├── StoreError               the run folder cannot be read or written
    └── RunFailed                the run cannot go on (quorum lost, update collapsed)      (exit code 1)

Everything else that escapes is a bug in fedllm and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "CodecError",
    "ConfigError",
    "DataError",
    "FedllmError",
    "ModelError",
    "RejectedReply",
    "RunFailed",
    "StoreError",
    "WireError",
]


class FedllmError(Exception):
    """Base of all errors that say, in one sentence, what was wrong and what would be right."""


class ConfigError(FedllmError):
    """A configuration key, value or combination is wrong."""


class DataError(FedllmError):
    """A data file, column, row or partition is wrong."""


class ModelError(FedllmError):
    """A model, adapter or target module cannot be used."""


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
