"""Numbers and names as people read them."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable

__all__ = ["ago", "human_bytes", "human_seconds", "number", "saved", "suggest", "times"]


def human_bytes(count: float | None) -> str:
    """Write bytes with a decimal prefix and three digits.

    >>> human_bytes(999), human_bytes(1_536_000), human_bytes(None)
    ('999 B', '1.54 MB', '-')
    """
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        # What would round up to four digits belongs to the next unit.
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 999.5 else f"{value:.0f} TB"


def human_seconds(seconds: float | None) -> str:
    """Write a duration.

    >>> human_seconds(0.0123), human_seconds(75), human_seconds(600), human_seconds(7320)
    ('0.01 s', '1 min 15 s', '10 min', '2 h 2 min')
    >>> human_seconds(180_000)
    '2 d 2 h'
    """
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


def number(value: float | None, digits: int = 4) -> str:
    """Write a number short.

    >>> number(0.123456), number(None)
    ('0.1235', '-')
    """
    return "-" if value is None else f"{value:.{digits}g}"


def times(ratio: float) -> str:
    """Write a ratio.

    >>> times(8271.4), times(12.34), times(1.5)
    ('8,271x', '12.3x', '1.5x')
    """
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def saved(count: int, dense: int, codec: str) -> str:
    """Say how many times fewer bytes these are than their tensors in fp32, and by what; else nothing.

    Args:
        count: bytes that were sent.
        dense: bytes of the same tensors without a codec.
        codec: what encoded them; without one, it is the method that sends less than tensors.

    >>> saved(100, 800, "quantize(bits=4)"), saved(100, 800, "none"), saved(100, 104, "none")
    ('8x fewer by the codec', '8x fewer than dense', '')
    """
    if not count or dense < 1.05 * count:
        return ""
    return f"{times(dense / count)} fewer {'than dense' if codec == 'none' else 'by the codec'}"


def ago(at: float | None, now: float | None = None) -> str:
    """Write how long ago a Unix time was.

    >>> ago(100.0, now=175.0), ago(0.0, now=7300.0), ago(None)
    ('1 min ago', '2 h ago', 'never')
    """
    if at is None:
        return "never"
    passed = (time.time() if now is None else now) - at
    if passed < 2:
        return "just now"
    first, unit, *_ = human_seconds(round(passed)).split()
    return f"{float(first):.0f} {unit} ago"


def suggest(given: str, valid: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest that is valid, or all.

    >>> suggest("promt", ["prompt", "response"]), suggest("x", ["a", "b"]), suggest("x", [])
    ('; did you mean prompt?', '; valid are a, b', '; there is none')
    """
    names = sorted(valid)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; valid are {', '.join(names)}" if names else "; there is none"
