"""Conversations and preferences, as OpenAI, ShareGPT, Alpaca and others write them."""

from __future__ import annotations

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
    named,
    shown,
    structured,
)
from fedllm.errors import DataError

__all__ = ["Message", "Preference", "conversation_shape", "messages", "preference"]

Message = dict[str, str]
"""One turn: ``role`` (``system``, ``user`` or ``assistant``) and ``content``."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Roles as OpenAI's and ShareGPT's files write them."""

_CONVERSATIONS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and response": ("prompt", "response"),
    "prompt and completion": ("prompt", "completion"),
    "instruction, input and output": ("instruction", "output"),
}
"""Shapes of conversations by what to call them: the columns that each must have."""


class Preference(NamedTuple):
    """A conversation so far, and two ways in which the assistant may go on."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def conversation_shape(row: Row, names: Names = AS_THEY_ARE) -> str:
    """Say by which columns a row holds a conversation, for the one line that tells what was recognised.

    >>> conversation_shape(Row({"prompt": "Hi", "response": "Ho"}, "a.jsonl", "a.jsonl, line 1"))
    'prompt and response'

    Raises:
        DataError: it holds none; names the shapes that are read.
    """
    wanted = {
        shape: keys for shape, keys in _CONVERSATIONS.items() if not names or names.keys() & {*keys}
    } or _CONVERSATIONS
    for filled in (True, False):  # a parquet file has every column in every row
        for shape, keys in wanted.items():
            if has(row, keys, names, filled=filled):
                return shape
    raise DataError(
        f"{row.where}: there is no conversation in the columns {column_names(row)}; wanted are messages (a "
        "list of role and content), conversations (a list of from and value), prompt and response, or "
        "instruction, input and output"
    )


def messages(row: Row, names: Names = AS_THEY_ARE) -> list[Message] | None:
    r"""Return a row's conversation; ``None`` where no assistant says anything in it.

    Instruction and input become one turn of the user, with an empty line between them. A column ``system``
    beside a prompt or an instruction is the system's turn.

    >>> row = Row({"instruction": "Add.", "input": "1, 2", "output": "3"}, "a.jsonl", "a.jsonl, line 1")
    >>> [message["content"] for message in messages(row) or ()]
    ['Add.\n\n1, 2', '3']

    Raises:
        DataError: the row holds another shape, or a turn lacks its role or its text.
    """
    shape = conversation_shape(row, names)
    keys = _CONVERSATIONS[shape]
    asked, answered = (names.get(key, key) for key in (keys[0], keys[-1]))
    if len(keys) == 1:
        found = [] if absent(row.columns[asked]) else _turns(row, asked)
    else:
        question = _said(row, asked, "user")
        extra = names.get("input", "input")
        if keys[0] == "instruction" and (given := as_text(row, row.columns.get(extra), f"column {extra!r}")):
            question[-1]["content"] += f"\n\n{given}"
        if all(blank(turn["content"]) for turn in question):
            return None
        found = [*_system(row, names), *question, *_said(row, answered, "assistant")]
    spoken = any(turn["role"] == "assistant" and not blank(turn["content"]) for turn in found)
    return found if spoken else None


def preference(row: Row, names: Names = AS_THEY_ARE) -> Preference | None:
    """Return a row's prompt with the answer that was chosen and the one that was rejected.

    Answers are texts or turns; turns may repeat the prompt. Where there is no prompt, it is the turns with
    which both begin. ``None`` where one of the three has no text, or both answers are the same.

    Raises:
        DataError: a column is missing or of another shape, or an answer does not begin with the assistant.
    """
    chosen, rejected = (named(row, key, names) for key in ("chosen", "rejected"))
    prompt = names.get("prompt", "prompt")
    better, worse = _said(row, chosen, "assistant"), _said(row, rejected, "assistant")
    before = _in_common(better, worse) if absent(row.columns.get(prompt)) else _said(row, prompt, "user")
    if before == better[: len(before)] == worse[: len(before)]:
        better, worse = better[len(before) :], worse[len(before) :]
    for name, answer in ((chosen, better), (rejected, worse)):
        if answer and answer[0]["role"] != "assistant":
            raise DataError(
                f"{row.where}: column {name!r} must go on from {prompt!r} with the assistant, but goes on "
                f"with the {answer[0]['role']}"
            )
    filled = all(any(not blank(turn["content"]) for turn in side) for side in (before, better, worse))
    if not filled or better == worse:
        return None
    return Preference([*_system(row, names), *before], better, worse)


def _in_common(one: list[Message], other: list[Message]) -> list[Message]:
    """Return the turns with which both begin, up to the last one of the user."""
    same = 0
    for number, (turn, twin) in enumerate(zip(one, other, strict=False), start=1):
        if turn != twin:
            break
        same = number if turn["role"] == "user" else same
    return one[:same]


def _system(row: Row, names: Names) -> list[Message]:
    name = names.get("system", "system")
    said = as_text(row, row.columns.get(name), f"column {name!r}")
    return [] if blank(said) else [{"role": "system", "content": said}]


def _said(row: Row, column: str, role: str) -> list[Message]:
    """Return what stands in a column: turns, or the text of one turn."""
    value = row.columns[column]
    if isinstance(value, list):
        return _turns(row, column)
    return [{"role": role, "content": as_text(row, value, f"column {column!r}")}]


def _turns(row: Row, column: str) -> list[Message]:
    return [
        _turn(row, turn, f"turn {number} of column {column!r}")
        for number, turn in enumerate(structured(row, column, list), start=1)
    ]


def _turn(row: Row, turn: Any, what: str) -> Message:
    """Read one turn as OpenAI's files (role, content) or ShareGPT's (from, value) write it."""
    if isinstance(turn, dict):
        for who, says in (("role", "content"), ("from", "value")):
            if who in turn and says in turn:
                return _message(row, turn, turn[who], turn[says], what)
    found = ", ".join(map(str, turn)) if isinstance(turn, dict) else shown(turn)
    raise DataError(f"{row.where}: {what} must have role and content, or from and value, not {found[:80]}")


def _message(row: Row, turn: dict[str, Any], who: Any, says: Any, what: str) -> Message:
    role = _ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        raise DataError(f"{row.where}: {what} is said by {who!r}; known are {', '.join(_ROLES)}")
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise DataError(f"{row.where}: {what} calls a tool ({key}), which is not read; leave it out")
    if turn.get("weight") == 0:
        raise DataError(f"{row.where}: {what} has weight 0, which is not read; every answer is learnt")
    if isinstance(says, list):
        says = "".join(_part(row, part, what) for part in says)
    return {"role": role, "content": as_text(row, says, what)}


def _part(row: Row, part: Any, what: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return as_text(row, part.get("text"), what)
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise DataError(f"{row.where}: {what} has a part of type {kind}; only text is read")
