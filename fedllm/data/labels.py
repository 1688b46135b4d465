"""Class labels: what can be one, which differ in nothing that can be seen, and how classes are numbered."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedllm.data.partition import Indices
from fedllm.errors import DataError

__all__ = ["Label", "blank", "known", "numbered", "plain", "tidy"]

Label = str | int
"""A class as the data name it: a name, or a whole number."""

_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")
_FRACTION = re.compile(r"-?[0-9]+\.[0-9]+")
_HALF = re.compile("[\ud800-\udfff]")
_LONGEST = 18
"""Digits of a label that is still a number."""

logger = logging.getLogger(__name__)


def tidy(text: str) -> str:
    r"""Return a name without what nobody sees: Unicode form C, single blanks, nothing invisible at the ends.

    >>> tidy("sports\u200b "), tidy("cafe\u0301") == "caf\u00e9", tidy("a\n b\x00")
    ('sports', True, 'a b')
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    composed = unicodedata.normalize("NFC", text)
    spaced = "".join(" " if unicodedata.category(c) == "Cc" else c for c in composed)
    invisible = {c for c in spaced if unicodedata.category(c) == "Cf"}
    return " ".join(spaced.split()).strip("".join(invisible) + " ")


def blank(text: str) -> bool:
    r"""Whether a text holds nothing to see: blanks, control characters, zero-width spaces.

    >>> blank(" \u200b\x00"), blank("\u200bx")
    (True, False)
    """
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def plain(value: Any) -> Label | None:
    """Return a value as a label: a tidy name or a whole number; ``None`` where there is none in it.

    Raises:
        ValueError: it can be no label; says what it is.

    >>> plain(3.0), plain(" x "), plain("2.0"), plain(float("nan")), plain("")
    (3, 'x', '2.0', None, None)
    """
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} {str(value)[:40]}")
    require_whole(value)
    return tidy(value) or None


def require_whole(text: str) -> None:
    """Refuse a text with half a character in it, which no tokenizer and no file takes.

    Raises:
        ValueError: says which half.
    """
    if half := _HALF.search(text):
        raise ValueError(f"text with half a character (a lone surrogate, \\u{ord(half[0]):04x})")


def numbered(raw: Sequence[Label]) -> tuple[Indices, tuple[str, ...]]:
    """Number the classes: whole numbers by value, names by alphabet.

    Labels that are all whole numbers are the same classes however they are written, 1, "1" or "1.0".

    Raises:
        DataError: names and numbers are mixed, or the labels are fractions.

    >>> numbered(["10", "9.0", 9])[1], numbered(["10", "x"])[1]
    (('9', '10'), ('10', 'x'))
    """
    written = set(raw)
    values = {label: label if (number := _number(label)) is None else number for label in written}
    distinct: list[Any] = sorted(set(values.values()), key=lambda value: (isinstance(value, str), value))
    if isinstance(distinct[-1], str):
        # Where there is a name, labels that look like numbers are names too.
        if any(isinstance(label, int) for label in written):
            raise DataError("the label column mixes whole numbers and names")
        values, distinct = {label: label for label in written}, sorted(map(str, written))
        if all(_FRACTION.fullmatch(name) for name in distinct):
            raise DataError(f"the label column holds fractions such as {distinct[0]}; classes are wanted")
    elif len(written) > len(distinct):
        logger.warning("labels such as 1 and 1.0 are written differently; they are taken as one class")
    numbers = {value: number for number, value in enumerate(distinct)}
    place = {label: numbers[value] for label, value in values.items()}
    return np.array([place[value] for value in raw], dtype=np.int64), tuple(map(str, distinct))


def known(raw: Sequence[Label], names: Sequence[str]) -> Indices:
    """Number labels by classes that are known already.

    As in :func:`numbered`, 1, "1" and "1.0" are one class where all names are whole numbers, and what is
    written differently is different where one is not.

    Raises:
        DataError: a label is none of them, or two of them are one.

    >>> known([1, "0.0"], ["0", "1"]).tolist()
    [1, 0]
    >>> known(["1", "1.0"], ["1", "1.0", "beta"]).tolist()
    [0, 1]
    """
    key = _key if all(_number(name) is not None for name in names) else _name
    place: dict[str, int] = {}
    for number, name in enumerate(names):
        if (other := place.setdefault(key(name), number)) != number:
            raise DataError(
                f"the classes {names[other]!r} and {name!r} are the same: name one of them in data.classes"
            )
    numbers = [place.get(key(value), -1) for value in raw]
    if -1 in numbers:
        strange = str(raw[numbers.index(-1)])
        raise DataError(f"label {strange!r} is none of the federation's classes: {', '.join(names)}")
    return np.array(numbers, dtype=np.int64)


def _number(value: Label) -> int | None:
    """Return the whole number that a label is."""
    if isinstance(value, int):
        return value
    found = _WHOLE.fullmatch(value)
    return int(found[1]) if found and len(found[1]) <= _LONGEST else None


def _name(value: Label) -> str:
    return tidy(str(value))


def _key(value: Label) -> str:
    number = _number(value)
    return _name(value) if number is None else str(number)
