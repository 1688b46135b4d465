"""Entities: words with tags, whatever the letters of the tags, and texts with spans."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fedllm.data.labels import blank
from fedllm.data.reading import Row
from fedllm.data.shapes.columns import (
    AS_THEY_ARE,
    Names,
    absent,
    as_text,
    column_names,
    has,
    shown,
    structured,
    text_column,
)
from fedllm.errors import DataError

__all__ = ["Tagged", "iob2", "tagged", "tagged_by_spans", "words"]

_BEGINS = {"B": "B", "S": "B", "U": "B", "I": "I", "E": "I", "L": "I"}
"""Prefixes of IOB, IOBES and BILOU as IOB2 has them."""


class Tagged(NamedTuple):
    """Words, the IOB2 tag of each, and how many tags were written otherwise."""

    tokens: list[str]
    tags: list[str]
    repaired: int


def tagged(row: Row, names: Names = AS_THEY_ARE) -> Tagged | None:
    """Return a row's words and tags, from lists of them or from a text with spans.

    Spans are ``{"start", "end", "label"}`` or ``[start, end, label]``, in a column ``spans`` or ``entities``.

    >>> tagged(Row({"tokens": ["to", "Rio"], "tags": ["O", "I-city"]}, "a.jsonl", "a.jsonl, line 1"))
    Tagged(tokens=['to', 'Rio'], tags=['O', 'B-city'], repaired=1)

    Raises:
        DataError: there are neither, their numbers differ, or a tag or a span is none.
    """
    if has(row, ("tokens", "tags"), names):
        tokens, tags = (names.get(key, key) for key in ("tokens", "tags"))
        if absent(row.columns[tokens]) and absent(row.columns[tags]):
            return None
        found = [
            as_text(row, word, f"an item of column {tokens!r}") for word in structured(row, tokens, list)
        ]
        written = structured(row, tags, list)
        if len(written) != len(found):
            raise DataError(f"{row.where}: {len(found)} {tokens} have {len(written)} {tags}")
        if not any(not blank(word) for word in found):
            return None
        try:
            repaired, count = iob2(written)
        except ValueError as error:
            raise DataError(f"{row.where}: column {tags!r}: {error}") from None
        return Tagged(found, repaired, count)
    for key in ("spans", "entities"):
        if has(row, ("text", key), names):
            return _tagged_by_spans(row, names.get(key, key), names)
    raise DataError(
        f"{row.where}: there are no entities in the columns {column_names(row)}; wanted are tokens and tags "
        "(two lists), or text and spans (a list of start, end and label)"
    )


def iob2(tags: Sequence[Any]) -> tuple[list[str], int]:
    """Return tags as IOB2 writes them - every entity begins with ``B-`` - and how many were changed.

    IOB1, IOBES and BILOU say the same in other letters; an ``I-`` that continues nothing begins an entity.

    >>> iob2(["I-city", "I-city", "O", "B-city", "I-name", "S-name"])
    (['B-city', 'I-city', 'O', 'B-city', 'B-name', 'B-name'], 3)

    Raises:
        ValueError: something is no tag.
    """
    fixed: list[str] = []
    for tag in tags:
        prefix, mark, kind = tag.partition("-") if isinstance(tag, str) else ("", "", "")
        if tag == "O":
            fixed.append(tag)
            continue
        if prefix not in _BEGINS or not mark or not kind:
            raise ValueError(f"{shown(tag)} is no tag; tags are O, B-KIND and I-KIND")
        before = fixed[-1] if fixed else "O"
        goes_on = _BEGINS[prefix] == "I" and before in (f"B-{kind}", f"I-{kind}")
        fixed.append(f"{'I' if goes_on else 'B'}-{kind}")
    return fixed, sum(new != old for new, old in zip(fixed, tags, strict=True))


def words(text: str, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    r"""Yield where each word of a text begins and ends.

    Words end at white space; punctuation marks are words of their own, emoji and symbols are not.

    Args:
        text: the text.
        cuts: further offsets at which no word goes on.

    >>> text = "Rio, 5\u20ac."
    >>> [text[start:end] for start, end in words(text)]
    ['Rio', ',', '5€', '.']
    """
    start: int | None = None
    ends = set(cuts)
    for place, character in enumerate(text):
        mark = unicodedata.category(character)[0] == "P"
        if start is not None and (mark or character.isspace() or place in ends):
            yield start, place
            start = None
        if mark:
            yield place, place + 1
        elif start is None and not character.isspace():
            start = place
    if start is not None:
        yield start, len(text)


def tagged_by_spans(text: str, spans: Sequence[tuple[int, int, str]]) -> Tagged:
    """Cut a text into words, and tag those inside a span by its label; spans end where words do.

    >>> tagged_by_spans("From Rio de Janeiro.", [(5, 19, "city")]).tags
    ['O', 'B-city', 'I-city', 'I-city', 'O']

    Raises:
        ValueError: a span is empty, lies outside the text, or overlaps another.
    """
    inside: list[tuple[int, int, str]] = []
    for start, end, label in sorted(spans):
        if not 0 <= start < end <= len(text):
            raise ValueError(f"span {start} to {end} does not lie in the text's {len(text)} characters")
        if blank(text[start:end]):
            raise ValueError(f"span {start} to {end} holds nothing to see")
        if inside and start < inside[-1][1]:
            raise ValueError(f"spans {inside[-1][0]} to {inside[-1][1]} and {start} to {end} overlap")
        inside.append((start, end, label))
    places = list(words(text, [place for start, end, _ in inside for place in (start, end)]))
    tags = ["O"] * len(places)
    for start, end, label in inside:
        covered = [k for k, (first, last) in enumerate(places) if start <= first and last <= end]
        for k in covered:
            tags[k] = f"{'B' if k == covered[0] else 'I'}-{label}"
    return Tagged([text[first:last] for first, last in places], tags, 0)


def _tagged_by_spans(row: Row, column: str, names: Names) -> Tagged | None:
    text = text_column(row, "text", names)
    given = [] if absent(row.columns[column]) else structured(row, column, list)
    found = [_span(row, span, text, column) for span in given]
    if blank(text):
        return None
    try:
        return tagged_by_spans(text, found)
    except ValueError as error:
        raise DataError(f"{row.where}: column {column!r}: {error}") from None


def _span(row: Row, span: Any, text: str, column: str) -> tuple[int, int, str]:
    parts = [span.get(key) for key in ("start", "end", "label")] if isinstance(span, dict) else span
    match parts:
        case [int(start), int(end), str(label)] if label and not blank(label):
            said = span.get("text") if isinstance(span, dict) else None
            if isinstance(said, str) and said != text[start:end]:
                raise DataError(
                    f"{row.where}: column {column!r}: {said[:40]!r} is not what stands from {start} to {end} "
                    f"({text[start:end][:40]!r}); offsets count Unicode characters"
                )
            return start, end, label
    raise DataError(
        f"{row.where}: column {column!r}: a span has start, end and label, but this one is {shown(span)}"
    )
