"""What a node may say: the range of each number and the shape of each word that it sends, in one place.

Whatever comes from a node passes here, on its way in, before arithmetic, a record or the store sees it. A
claim within range may still be a lie; it can no longer be one that a computer stumbles over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from fedllm.errors import WireError

__all__ = [
    "MOST_EXAMPLES",
    "MOST_METRICS",
    "MOST_NODE",
    "MOST_TEXT",
    "facts",
    "failure",
    "metrics",
    "text",
    "whole",
]

MOST_NODE = 2**31 - 1
"""Largest number of a client."""
MOST_EXAMPLES = 2**32 - 1
"""Most texts that one reply can stand for: a record of slopes keeps them in four bytes."""
MOST_METRICS = 64
"""Metrics, and facts, that one reply may carry."""
MOST_TEXT = 2_000
"""Characters of a text."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./ -]{0,99}")
_RAISED = re.compile(r"<class '([\w.]+)'>:<'(.*)'>", re.DOTALL)
_RANGES: dict[str, tuple[float, float]] = {
    "node": (0, MOST_NODE),
    "held_out": (0, MOST_EXAMPLES),
    "cores": (0, 2**20),
    "memory_bytes": (0, 2**53),
    "peak_rss_bytes": (0, 2**53),
    "seconds": (0, 1e9),
    "forward": (0, 1e12),
    "backward": (0, 1e12),
    "forward_once": (0, 1e12),
    "state_lost": (0, 1),
}
"""Numbers that are added up or stored as integers."""
_SHAPES = {"fedllm": re.compile(r"[0-9][0-9A-Za-z.+!_-]{0,39}")}
"""Texts that are shown as what their name says; a node may leave any of them out."""
_ANY = (-1e100, 1e100)
"""All others: sums of so many, weighted by texts, stay within a float."""


def metrics(claimed: Mapping[str, object]) -> dict[str, float]:
    """Check numbers by name.

    Returns:
        Those that are finite: a client may well report a loss that is not.

    Raises:
        WireError: names the first that is no number, or out of its range.

    >>> metrics({"loss": 0.5, "seconds": 3})
    {'loss': 0.5, 'seconds': 3.0}
    """
    if len(claimed) > MOST_METRICS:
        raise WireError(f"{len(claimed)} metrics are more than the {MOST_METRICS} that a reply may carry")
    checked: dict[str, float] = {}
    for name, value in claimed.items():
        _check_name("metric", name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WireError(f"metric {name} is not one number")
        number = float(value)
        if not math.isfinite(number):
            continue
        low, high = _RANGES.get(name, _ANY)
        if not low <= number <= high:
            raise WireError(f"metric {name} is {number:g}, outside of {low:g} to {high:g}")
        checked[name] = number
    return checked


def facts(claimed: Mapping[str, object]) -> dict[str, str]:
    """Check texts by name; raises ``WireError`` for what is none, or too long."""
    if len(claimed) > MOST_METRICS:
        raise WireError(f"{len(claimed)} facts are more than the {MOST_METRICS} that a reply may carry")
    checked: dict[str, str] = {}
    for name, value in claimed.items():
        _check_name("fact", name)
        if not isinstance(value, str) or len(value) > MOST_TEXT:
            raise WireError(f"fact {name} is not a text of at most {MOST_TEXT} characters")
        if name in _SHAPES and not _SHAPES[name].fullmatch(value):
            raise WireError(f"fact {name} is {text(value)[:40]!r}, which is no version")
        checked[name] = text(value)
    return checked


def text(said: str) -> str:
    r"""Make a node's words harmless: cut, and without the characters that a terminal obeys.

    >>> text("out of \x1b[31mmemory")
    'out of �[31mmemory'
    """
    shown = (c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in said[:MOST_TEXT])
    return "".join(shown)


def failure(said: str) -> str:
    """Return why a node failed; Flower words an exception as ``<class 'kind'>:<'words'>``.

    An error of fedllm's own is a sentence by itself; of any other the kind belongs to it.

    >>> failure("<class 'fedllm.errors.WireError'>:<'the payload is not a single array'>")
    'the payload is not a single array'
    >>> failure("<class 'builtins.KeyError'>:<''x''>"), failure("killed")
    ("KeyError: 'x'", 'killed')
    """
    found = _RAISED.fullmatch(said)
    if found is None:
        return text(said)
    *modules, kind = found[1].split(".")
    own = modules[:1] in (["fedllm"], ["strategies"], ["client"], ["server"])
    return text(found[2] if own and found[2] else f"{kind}: {found[2]}")


def whole(name: str, value: float, most: int) -> int:
    """Return a number that counts something; raises ``WireError`` unless it is whole and in [0, most].

    >>> whole("node", 3.0, MOST_NODE)
    3
    """
    if not 0 <= value <= most or value != int(value):
        raise WireError(f"{name} is {value:g}; right is a whole number from 0 to {most}")
    return int(value)


def _check_name(kind: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise WireError(
            f"a {kind} is named {text(name)[:40]!r}; right are at most 100 plain letters and digits"
        )
