"""What a process uses of its machine."""

from __future__ import annotations

import platform
import resource

__all__ = ["peak_rss_bytes"]


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
