"""What a process uses of its machine."""

from __future__ import annotations

import contextlib
import platform
import resource

import psutil

__all__ = ["peak_rss_bytes", "resident_bytes"]


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children, in bytes; 0 once it is gone."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += int(process.memory_info().rss)
    return total
