"""What proves to a SuperLink that a caller on its host may command it: two files of its state, mode 0600."""

from __future__ import annotations

import secrets
from pathlib import Path

from fedllm.runs.durable import write_private

__all__ = ["BOUND", "EXECUTOR", "TOKEN", "TOKEN_HEADER", "make"]

TOKEN, EXECUTOR = "control-token", "executor-secret"
"""Files: who can read the first may start runs, who can read the second may execute them."""
BOUND = "bind"
"""File that says which address the SuperLink listens on."""
TOKEN_HEADER = "x-fedllm-token"


def make(folder: Path) -> None:
    """Draw both secrets where there are none yet."""
    for name in (TOKEN, EXECUTOR):
        path = folder / name
        if not path.exists():
            write_private(path, secrets.token_urlsafe(32).encode())
