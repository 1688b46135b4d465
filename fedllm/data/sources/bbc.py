"""Made-up tasks on the BBC's articles: pairs, numbers, entities, answers and rankings, true by construction.

They are no benchmarks: they show that a task trains, on real sentences and without a download. Every row
names the ``group`` of articles that it was made from; no article is in two groups, so that a split by groups
keeps all that was made from an article on one side. Articles that repeat a headline, or twenty words in a
row, of an earlier one are left out: many of them are a story told again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.data.bundled import corpus_folder
from fedllm.data.folders import class_folders
from fedllm.errors import DataError
from fedllm.randomness import stream

__all__ = ["KINDS", "Article", "articles", "entities", "pairs", "ranking", "regression", "spans"]

BLOCK = 8
"""Articles in one group of pairs and rankings; some groups have one more."""

RUN = 20
"""Words in a row by which an article is taken for an earlier one told again."""

HALF = 48
"""Words that a pair shows of each half of an article."""

PASSAGE = 64
"""Words in a text whose number is to be told, or whose entities are to be found."""

CONTEXT = 120
"""Words of an article in which an answer is looked for."""

LEAD = 30
"""Words of an article that are ranked for a headline."""

QUESTIONS = {
    "sum of money": re.compile(r"[£$€]\d(?:[\d,.]*\d)?(?:bn|m|k)?"),
    "percentage": re.compile(r"\d+(?:\.\d+)?%"),
    "year": re.compile(r"\b(?:19|20)\d\d\b"),
    "day of the week": re.compile(r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b"),
}
"""What a text is asked for, and what it looks like; of two that overlap the one named first here counts."""

Columns = Mapping[str, Any]


@dataclass(frozen=True)
class Article:
    """An article: its headline, the rest of it, and its class."""

    headline: str
    body: str
    topic: str


def articles() -> list[Article]:
    """Return the articles that repeat no earlier one, in the order of their files."""
    found: dict[str, Article] = {}
    told: set[int] = set()
    numbers: dict[str, int] = {}
    for row in class_folders(corpus_folder("bbcnews")):
        headline, body = map(str.strip, row.columns["text"].strip().split("\n", 1))
        runs = _runs([numbers.setdefault(word, len(numbers)) for word in body.split()])
        if headline not in found and told.isdisjoint(runs):
            found[headline] = Article(headline, body, row.columns["label"])
        told |= runs
    return list(found.values())


def _runs(words: list[int]) -> set[int]:
    """Return a random linear hash of all words that stand ``RUN`` in a row: 64 bits, equal for equal runs."""
    weights = stream(0, "bbc runs").integers(2**64, size=RUN, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(np.array(words, dtype=np.uint64), RUN)
    return set((windows @ weights).tolist())


def _blocks(every: Sequence[Article]) -> Iterator[tuple[str, list[Article]]]:
    """Yield the articles in groups of ``BLOCK`` and a few of one more, shuffled, with the group's name."""
    order = stream(0, "bbc blocks").permutation(len(every))
    for number, chosen in enumerate(np.array_split(order, max(1, len(every) // BLOCK))):
        yield f"articles {number}", [every[index] for index in chosen]


def pairs(every: Sequence[Article]) -> Iterator[Columns]:
    """Yield ``text``, ``pair`` and ``label``: are these halves of the ``same`` article, or ``different``?

    Shown is the beginning of each half. Each half stands in one row of either label, so that neither of a
    pair tells the label alone.
    """
    for group, block in _blocks(every):
        halves = [_halves(article.body.split()) for article in block]
        for number, (first, second) in enumerate(halves):
            other = halves[(number + 1) % len(halves)][1]
            yield {"text": first, "pair": second, "label": "same", "group": group}
            yield {"text": first, "pair": other, "label": "different", "group": group}


def _halves(words: list[str]) -> tuple[str, str]:
    middle = len(words) // 2
    return " ".join(words[:middle][:HALF]), " ".join(words[middle:][:HALF])


def regression(every: Sequence[Article]) -> Iterator[Columns]:
    """Yield ``text`` and ``label``: 64 words, and which share of them comes from an article on sports.

    The other words are of an article on something else. Each pair of articles gives three texts.
    """
    sports = [article for article in every if article.topic == "sports"]
    others = [article for article in every if article.topic != "sports"]
    draw = stream(0, "bbc regression")
    for number, index in enumerate(draw.permutation(len(others))[: len(sports)]):
        for _ in range(3):
            share = int(draw.integers(PASSAGE + 1))
            parts = [
                _words(sports[number].body, share, draw),
                _words(others[index].body, PASSAGE - share, draw),
            ]
            first = int(draw.integers(2))
            yield {
                "text": " ".join([*parts[first], *parts[1 - first]]),
                "label": share / PASSAGE,
                "group": f"articles {number}",
            }


def _words(text: str, count: int, draw: np.random.Generator) -> list[str]:
    """Return so many words that stand together somewhere in a text."""
    words = text.split()
    start = int(draw.integers(max(1, len(words) - count + 1)))
    return words[start : start + count]


def entities(every: Sequence[Article]) -> Iterator[Columns]:
    """Yield ``text``, ``entities`` and ``section``: sums, percentages, years, days in an article's beginning.

    Five sections write five kinds of news: split by ``section`` each client has a source of its own.
    """
    for number, article in enumerate(every):
        text = _beginning(article.body, PASSAGE)
        found: list[tuple[int, int, str]] = []
        for thing, form in QUESTIONS.items():
            for match in form.finditer(text):
                if all(match.end() <= start or end <= match.start() for start, end, _ in found):
                    found.append((match.start(), match.end(), thing))
        yield {
            "text": text,
            "entities": [list(one) for one in sorted(found)],
            "section": article.topic,
            "group": f"article {number}",
        }


def _beginning(text: str, count: int) -> str:
    return text[: [word.end() for word in re.finditer(r"\S+", text)][:count][-1]]


def spans(every: Sequence[Article]) -> Iterator[Columns]:
    """Yield ``question``, ``context`` and ``answers``: which sum, percentage, year or day comes first.

    The context is an article's first 120 words. It is asked for one thing that it names, if there is any,
    and every second article for one that it does not name.
    """
    for number, article in enumerate(every):
        context = _beginning(article.body, CONTEXT)
        draw = stream(0, "bbc spans", number)
        named = {thing: found for thing, form in QUESTIONS.items() if (found := form.search(context))}
        lacking = [thing for thing in QUESTIONS if thing not in named]
        asked = [str(draw.choice(list(named)))] if named else []
        if lacking and number % 2:
            asked.append(str(draw.choice(lacking)))
        for thing in asked:
            places = [named[thing]] if thing in named else []
            yield {
                "question": f"Which {thing} is named first?",
                "context": context,
                "answers": {
                    "text": [answer[0] for answer in places],
                    "answer_start": [answer.start() for answer in places],
                },
                "group": f"article {number}",
            }


def ranking(every: Sequence[Article]) -> Iterator[Columns]:
    """Yield ``query``, ``candidates`` and ``clicks``: a headline, and which article's lead is its own."""
    for group, block in _blocks(every):
        leads = [" ".join(article.body.split()[:LEAD]) for article in block]
        for number, article in enumerate(block):
            order = stream(0, "bbc ranking", article.headline).permutation(len(block))
            yield {
                "query": article.headline,
                "candidates": [leads[index] for index in order],
                "clicks": [int(index == number) for index in order],
                "group": group,
            }


def _named(
    kind: str, make: Callable[[Sequence[Article]], Iterator[Columns]]
) -> Callable[[str], Iterator[Columns]]:
    def rows(argument: str) -> Iterator[Columns]:
        if argument:
            raise DataError(f"data.name = 'bbc-{kind}:{argument}': nothing can be chosen there; leave it out")
        return make(articles())

    return rows


def _entities(argument: str) -> Iterator[Columns]:
    """Return rows of the sections that are named, of all where none is."""
    every = articles()
    sections = sorted({article.topic for article in every})
    chosen = [name.strip() for name in argument.split("+")] if argument else sections
    for name in chosen:
        if name not in sections:
            raise DataError(
                f"data.name = 'bbc-entities:{argument}': {name!r} is none of the sections "
                f"{', '.join(sections)}"
            )
    return entities([article for article in every if article.topic in chosen])


KINDS: Mapping[str, Callable[[str], Iterator[Columns]]] = {
    "entities": _entities,
    **{kind.__name__: _named(kind.__name__, kind) for kind in (pairs, ranking, regression, spans)},
}
"""What makes the rows of ``data.name = "bbc-..."``, given what stands behind the name's colon."""
