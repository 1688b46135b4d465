"""How the C library keeps memory that has been freed."""

from __future__ import annotations

import ctypes
import functools
import platform

__all__ = ["give_back_large_blocks"]

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20


@functools.cache
def give_back_large_blocks() -> bool:
    """Let this process give each block of a mebibyte or more back to the system as soon as it is freed.

    glibc raises that bound up to 32 MiB as blocks come and go. Freed tensors then stay in its heap, between
    others that live on, and a step takes up to three times the memory that its tensors fill. What is given
    back has to be fetched again, which changes no number and costs time, most of all in bfloat16. It is for
    what was chosen for its little memory.

    Returns:
        Whether it could be set; only glibc, the C library of most Linux systems, can be told.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE))
