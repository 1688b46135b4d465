"""What the dashboard says no to.

FedllmError
├── Missing      there is no such run, file or node   (404)
├── Conflict     not in the state that things are in  (409)
└── Denied       not with this role                   (403)
"""

from __future__ import annotations

from fedllm.errors import FedllmError

__all__ = ["Conflict", "Denied", "Missing"]


class Missing(FedllmError):
    """There is no such thing."""


class Conflict(FedllmError):
    """It cannot be done as things stand."""


class Denied(FedllmError):
    """It is not for this role."""
