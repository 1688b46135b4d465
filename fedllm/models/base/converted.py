"""Reading a checkpoint's tensors one by one, where they are kept in another precision than their file's.

transformers maps a file of weights whole. The system counts the mapping in full against a process's limit on
its memory, and its pages as they are read: 538 MB for SmolLM2, of which bfloat16 keeps half.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fedllm.tensors import Tensors

__all__ = ["converted"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FILE = "model.safetensors"
_PIECE = 1 << 22
"""Numbers that are read at a time: 16 MiB in float32."""


def converted(source: str, dtype: torch.dtype) -> Tensors | None:
    """Return a checkpoint's tensors in a precision that none of them has in its file.

    Args:
        source: folder of a model.
        dtype: what they are converted to.

    Returns:
        By name; None where transformers has to read the checkpoint itself: it is not one whole safetensors
        file, or some tensors are in that precision already and need no second copy.
    """
    path = Path(source) / _FILE
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head, start = _head(file, path.stat().st_size)
        if not head or any(_DTYPES.get(told["dtype"], dtype) == dtype for told in head.values()):
            return None
        return {name: _read(file, told, start, dtype) for name, told in head.items()}


def _head(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """Return what a file says of its tensors, and where they begin; nothing where it is cut short."""
    start = 8 + int.from_bytes(file.read(8), "little")
    if start > size:
        return {}, 0
    try:
        head: dict[str, Any] = json.loads(file.read(start - 8))
    except ValueError:
        return {}, 0
    head.pop("__metadata__", None)
    whole = size == start + max((told["data_offsets"][1] for told in head.values()), default=0)
    return (head, start) if whole and all(map(_fits, head.values())) else ({}, 0)


def _fits(told: dict[str, Any]) -> bool:
    """Whether a tensor has as many bytes in the file as its shape says; not asked of unknown precisions."""
    kind, (first, end) = _DTYPES.get(told["dtype"]), told["data_offsets"]
    return kind is None or end - first == math.prod(told["shape"]) * kind.itemsize


def _read(file: BinaryIO, told: dict[str, Any], start: int, dtype: torch.dtype) -> torch.Tensor:
    found = torch.empty(told["shape"], dtype=dtype)
    flat, kind = found.view(-1), _DTYPES[told["dtype"]]
    file.seek(start + told["data_offsets"][0])
    for first in range(0, len(flat), _PIECE):
        piece = torch.empty(min(_PIECE, len(flat) - first), dtype=kind)
        raw = file.read(piece.nbytes)
        if len(raw) < piece.nbytes:
            raise OSError(f"{_FILE} ended while it was read")
        piece.view(torch.uint8).numpy()[:] = memoryview(raw)
        flat[first : first + len(piece)] = piece
    return found
