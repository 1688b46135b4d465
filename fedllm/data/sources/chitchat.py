"""Two people talking: the Chit-Chat Challenge of BYU, 7,168 dialogues that come with chitchat-dataset.

Myers, Etchart and Fulda, "Conversational Scaffolding", 2020; MIT licence. 3,150 of the dialogues are a turn
that nobody answered.

A dialogue is given once from either side. Whose side it is stands in ``participant``; their turns are the
``assistant``'s, those of the other the ``user``'s. A turn is all that one of them wrote before the other
did, a line each. Turns of the participant before the other's first, and of the other behind the
participant's last, are left out, since they answer nothing and are not answered. Long dialogues are cut
every eight turns, so that a row fits into a few hundred tokens, or as ``chitchat(turns=4)`` says. ``group``
names the dialogue: a split by groups keeps both sides of a dialogue on one side of the split.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.data.labels import blank
from fedllm.errors import DataError
from fedllm.extras import require

__all__ = ["conversations", "most_talkative", "rows", "turns"]

TURNS = 8
"""Turns in a row, at most, unless asked otherwise; even, so that every piece ends with an answer."""

Columns = dict[str, Any]
Dialogue = Sequence[tuple[str, str]]
"""Lines in order: who wrote, and what."""

logger = logging.getLogger(__name__)


def rows(argument: str) -> Iterator[Columns]:
    """Yield ``messages``, ``participant`` and ``group`` of every dialogue, in the order of the package.

    Args:
        argument: how many participants, those with the most rows, and how many turns a row has at most, as
            in ``16(turns=4)``; all of them where it is empty, and :data:`TURNS` turns.

    Raises:
        DataError: it is neither, or there are not so many participants.
    """
    require("chitchat_dataset", "data.name = 'chitchat'")
    argument, length = turns(argument)
    every = _dialogues()
    found = [row for name, lines in every.items() for row in conversations(name, lines, length)]
    silent = len(every) - len({row["group"] for row in found})
    logger.info("%d of the %d dialogues are left out: nobody answered", silent, len(every))
    chosen = most_talkative(Counter(row["participant"] for row in found), argument)
    yield from (row for row in found if row["participant"] in chosen)


def turns(argument: str) -> tuple[str, int]:
    """Return what stands before ``(turns=N)``, and N, an even number; :data:`TURNS` where there is none.

    >>> turns("16(turns=4)")
    ('16', 4)
    """
    found = re.fullmatch(r"(.*?)\s*\(\s*turns\s*=\s*([0-9]{1,3})\s*\)\s*", argument)
    if found is None:
        return argument, TURNS
    length = int(found[2])
    if length < 2 or length % 2:
        raise DataError(
            f"data.name = 'chitchat:{argument}': turns is an even number from 2 on, so that every row ends "
            "with an answer"
        )
    return found[1], length


def most_talkative(counts: Counter[str], argument: str) -> set[str]:
    """Return so many participants as the text says, those with the most rows; all where it says nothing.

    >>> sorted(most_talkative(Counter(ann=2, bob=3, eve=2), "2"))
    ['ann', 'bob']
    """
    if not argument:
        return set(counts)
    if argument.isascii() and argument.isdigit() and 0 < int(argument) <= len(counts):
        return set(sorted(counts, key=lambda who: (-counts[who], who))[: int(argument)])
    raise DataError(
        f"data.name = 'chitchat:{argument}': behind the colon stands a number of participants, "
        f"1 to {len(counts)}, and (turns=N) where rows are to have others than {TURNS} turns"
    )


def _dialogues() -> Mapping[str, Dialogue]:
    """Read the package's file: what each participant wrote in turn, without what is blank."""
    package = importlib.util.find_spec("chitchat_dataset")
    assert package is not None
    assert package.origin is not None
    with (Path(package.origin).parent / "dataset.json").open(encoding="utf-8") as file:
        every = json.load(file)
    return {
        name: [
            (line["sender"], line["text"].strip())
            for turn in dialogue["messages"]
            for line in turn
            if not blank(line["text"])
        ]
        for name, dialogue in every.items()
    }


def conversations(name: str, lines: Dialogue, length: int = TURNS) -> Iterator[Columns]:
    r"""Yield a dialogue's rows: for each participant, in pieces.

    Args:
        name: of the dialogue.
        lines: who wrote which line, in order.
        length: of a piece, in turns, at most; even.

    >>> talk = [("ann", "Hi"), ("ann", "there"), ("bob", "Ho"), ("ann", "Bye")]
    >>> for row in conversations("1", talk):
    ...     print(row["participant"], [turn["content"] for turn in row["messages"]])
    ann ['Ho', 'Bye']
    bob ['Hi\nthere', 'Ho']
    """
    joined = list(_turns(lines))
    for participant in dict.fromkeys(who for who, _ in joined):
        said = [
            {"role": "assistant" if who == participant else "user", "content": text} for who, text in joined
        ]
        first = 0 if said[0]["role"] == "user" else 1
        last = len(said) if said[-1]["role"] == "assistant" else len(said) - 1
        for start in range(first, last, length):
            piece = said[start : min(start + length, last)]
            yield {"messages": piece, "participant": participant, "group": name}


def _turns(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Join the lines that one person wrote one after the other."""
    for who, group in itertools.groupby(lines, key=lambda line: line[0]):
        yield who, "\n".join(text for _, text in group)
