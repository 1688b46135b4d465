"""Answers that stand in a text, as SQuAD has them, and candidates to rank for a query."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedllm.data.labels import blank
from fedllm.data.reading import Row
from fedllm.data.shapes.columns import (
    AS_THEY_ARE,
    Names,
    absent,
    as_text,
    named,
    shown,
    structured,
    text_column,
)
from fedllm.errors import DataError

__all__ = ["Answers", "Candidates", "answers", "candidates"]


class Answers(NamedTuple):
    """A question to a text, and where in the text its answers are: ``(text, start)``, none or several."""

    question: str
    context: str
    answers: list[tuple[str, int]]


class Candidates(NamedTuple):
    """Texts to rank for a query, and which of them were chosen (1) or not (0)."""

    query: str
    texts: list[str]
    clicks: list[int]


def answers(row: Row, names: Names = AS_THEY_ARE) -> Answers | None:
    """Return a row's question, text and answers, in SQuAD's shape.

    Answers are ``{"text": [...], "answer_start": [...]}`` or a list of such objects with one text each; none
    means that the text does not say.

    Raises:
        DataError: an answer does not stand where it should.
    """
    question, context = (text_column(row, key, names) for key in ("question", "context"))
    name = named(row, "answers", names)
    found = [_answer(row, text, start, context, name) for text, start in _listed_answers(row, name)]
    return None if blank(question) or blank(context) else Answers(question, context, found)


def _listed_answers(row: Row, name: str) -> list[tuple[Any, Any]]:
    given = [] if absent(row.columns[name]) else structured(row, name, list, dict)
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
    elif all(isinstance(item, dict) for item in given):
        return [(item.get("text"), item.get("answer_start")) for item in given]
    raise DataError(
        f"{row.where}: column {name!r} must hold text and answer_start, two lists of one length, not "
        f"{shown(given)}"
    )


def _answer(row: Row, text: Any, start: Any, context: str, name: str) -> tuple[str, int]:
    if not isinstance(text, str) or not text or not isinstance(start, int) or isinstance(start, bool):
        raise DataError(
            f"{row.where}: column {name!r}: an answer has a text and a start, but this one has "
            f"{shown(text)} and {shown(start)}"
        )
    if start < 0 or not context.startswith(text, start):
        place = context.find(text)
        stands = f"it stands at {place}" if place >= 0 else "it is nowhere in the context"
        raise DataError(
            f"{row.where}: column {name!r}: {text[:40]!r} does not stand at {start} of the context; {stands}"
        )
    return text, start


def candidates(row: Row, names: Names = AS_THEY_ARE) -> Candidates | None:
    """Return a row's query, the texts to rank for it, and which were chosen.

    Raises:
        DataError: a column is missing, there are not as many clicks as candidates, or a click is not 0 or 1.
    """
    query = text_column(row, "query", names)
    shown_to, chosen = (named(row, key, names) for key in ("candidates", "clicks"))
    listed, clicks = (structured(row, name, list) for name in (shown_to, chosen))
    if len(listed) != len(clicks):
        raise DataError(f"{row.where}: {len(listed)} {shown_to} have {len(clicks)} {chosen}")
    if strange := [click for click in clicks if click not in (0, 1)]:
        raise DataError(f"{row.where}: column {chosen!r}: {shown(strange[0])} is neither 0 nor 1")
    texts = [as_text(row, text, f"an item of column {shown_to!r}") for text in listed]
    return None if blank(query) or not texts else Candidates(query, texts, [int(click) for click in clicks])
