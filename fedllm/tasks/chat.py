"""Conversations as tokens: through the tokenizer's own chat template, or the plain one here.

A conversation is a list of messages, each a mapping with ``role`` and ``content``, both texts; whatever else
a message holds is the template's own affair. Where a tokenizer brings no template, it is written so, and each
piece is tokenised for itself, so that where an answer begins never depends on what it says:

    <begin>System:
    You are brief.
    User:
    What is zinc?
    Assistant:
    A metal.<end>User:
    ...

``<begin>`` stands where the tokenizer begins texts with such a token, ``<end>`` is its end token. Special
tokens that are spelled out in a message are read as special tokens, as in any other text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

from fedllm.data.labels import require_whole
from fedllm.errors import DataError

__all__ = ["Answered", "Message", "cut", "end_of_turn", "fit", "render", "turn_ends", "with_answers"]

Message = Mapping[str, Any]

_TITLES = {"system": "System", "user": "User", "assistant": "Assistant"}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant says."""

_PROBE = "An answer of seven plain words."
_DATED = "strftime_now"
_DAY = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('%{c}', '{datetime(2025, 1, 1):%{c}}')" for c in "aAbBdmyYHMS")
    + " }}{%- endmacro %}{{ '' }}"
)
"""Some templates write today's date; tokens must not depend on the day on which they are made."""


class Answered(NamedTuple):
    """A conversation to learn from.

    Attributes:
        ids: its tokens.
        mask: which of them an assistant says, the token that ends its turn included.
    """

    ids: list[int]
    mask: list[bool]


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
    """Return a conversation's tokens.

    Args:
        tokenizer: of transformers.
        messages: at least one.
        generation_prompt: end with what an answer of the assistant begins with.

    Raises:
        DataError: this is no conversation, or the template refuses it.
    """
    _check(messages)
    if not tokenizer.chat_template:
        ids = [token for piece in _plain(tokenizer, messages) for token in piece]
        return ids + (_header(tokenizer, "assistant") if generation_prompt else [])
    return _encode(tokenizer, [_text(tokenizer, messages, generation_prompt)])[0]


def with_answers(tokenizer: Any, messages: Sequence[Message]) -> Answered:
    """Return a conversation's tokens, and which of them are answers: those of every turn of the assistant.

    Where a template marks them (``{% generation %}``), those marks hold, and the end token that follows one.
    Otherwise an answer is what follows the tokens of all before it, to the tokens of all up to it; both must
    be exact beginnings of the whole conversation's tokens.

    Raises:
        DataError: this is no conversation, nobody answers in it, the template refuses it, or tokenises the
            messages before an answer otherwise once the answer, or what comes after it, stands there.
    """
    _check(messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError("the conversation holds no message of the assistant, so there is nothing to learn")
    if not tokenizer.chat_template:
        pieces = _plain(tokenizer, messages)
        mask = [number % 2 == 0 and number // 2 - 1 in turns for number, _ in enumerate(pieces)]
        return Answered(
            [token for piece in pieces for token in piece],
            [said for said, piece in zip(mask, pieces, strict=True) for _ in piece],
        )
    if _MARKED.search(_template(tokenizer)):
        return _by_marks(tokenizer, messages, turns[-1])
    return _by_beginnings(tokenizer, messages, turns)


def end_of_turn(tokenizer: Any, messages: Sequence[Message]) -> int | None:
    """Return the special token that ends an answer to ``messages``; ``None`` where the template has none.

    Raises:
        DataError: as :func:`render`.
    """
    _check(messages)
    if not tokenizer.chat_template:
        return _end(tokenizer)
    text = _text(tokenizer, [*messages, {"role": "assistant", "content": _PROBE}], False)
    _, found, rest = text.rpartition(_PROBE)
    if not found:
        raise DataError("the tokenizer's chat template leaves out what the assistant says")
    (after,) = _encode(tokenizer, [rest])
    return after[0] if after and after[0] in _special(tokenizer) else None


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer to a single message; see :func:`end_of_turn`.

    Raises:
        DataError: as :func:`render`.
    """
    end = end_of_turn(tokenizer, [{"role": "user", "content": _PROBE}])
    return frozenset() if end is None else frozenset({end})


def cut(answered: Answered, length: int, begin: int | None = None) -> Answered:
    """Return the last ``length`` tokens, but no fewer than begin the last answer with one before it.

    What is cut is the prompt, from the left, and the end of the last answer only where it does not fit alone.

    Args:
        answered: a conversation.
        length: of the result, at least 2.
        begin: the token that texts begin with; it stays in front where it was.

    >>> cut(Answered([7, 1, 2, 3, 4, 5], [False, False, False, True, True, True]), 4, begin=7).ids
    [7, 3, 4, 5]
    """
    ids, mask = answered
    if len(ids) <= length:
        return answered
    kept = 1 if ids[0] == begin else 0
    last = len(mask) - 1 - mask[::-1].index(True)
    while last > 0 and mask[last - 1]:
        last -= 1
    room = length - kept
    start = max(kept, min(len(ids) - room, last - (0 if kept else 1)))
    stop = start + room
    return Answered(ids[:kept] + ids[start:stop], mask[:kept] + mask[start:stop])


def fit(tokenizer: Any, messages: Sequence[Message], room: int) -> tuple[list[Message], list[int]]:
    """Forget the oldest turns until the conversation fits, with the prompt for an answer at its end.

    What a system message at the start says is never forgotten, nor is the last message.

    Args:
        tokenizer: of transformers.
        messages: the last is to be answered.
        room: tokens that the prompt may have.

    Returns:
        The messages that are left, and their tokens.

    Raises:
        DataError: the last message does not fit by itself; or as :func:`render`.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    while True:
        ids = render(tokenizer, [*system, *turns], generation_prompt=True)
        if len(ids) <= room:
            return [*system, *turns], ids
        later = [index for index, message in enumerate(turns) if index and message["role"] == "user"]
        if not later:
            raise DataError(
                f"the message takes {len(ids)} tokens with what surrounds it, and {room} are left for it: "
                "shorten it, or the system message, or ask for fewer new tokens"
            )
        turns = turns[later[0] :]


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("the conversation holds no message")
    for number, message in enumerate(messages, 1):
        for name in ("role", "content"):
            value = message.get(name) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise DataError(
                    f"message {number} must be an object whose role and content are texts; its {name} is "
                    f"{type(value).__name__ if value is not None else 'missing'}"
                )
            try:
                require_whole(value)
            except ValueError as error:
                raise DataError(f"message {number}: its {name} is {error}") from error


def _plain(tokenizer: Any, messages: Sequence[Message]) -> list[list[int]]:
    """Return the beginning, then a header and a content for each message."""
    pieces = [[] if (begin := _begin(tokenizer)) is None else [begin]]
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _TITLES:
            raise DataError(
                f"message {number} is of {role!r}; without a chat template of the tokenizer's own, roles are "
                f"{', '.join(_TITLES)}"
            )
        (content,) = _encode(tokenizer, [message["content"] + ("" if role == "assistant" else "\n")])
        pieces += [_header(tokenizer, role), content + ([_end(tokenizer)] if role == "assistant" else [])]
    return pieces


def _header(tokenizer: Any, role: str) -> list[int]:
    return _encode(tokenizer, [f"{_TITLES[role]}:\n"])[0]


def _begin(tokenizer: Any) -> int | None:
    first: list[int] = tokenizer("a")["input_ids"][:1]
    begin: int | None = tokenizer.bos_token_id
    return begin if first == [begin] else None


def _end(tokenizer: Any) -> int:
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has neither a chat template nor an end token, so no answer could ever end: take a "
            "model with either"
        )
    return end


def _by_marks(tokenizer: Any, messages: Sequence[Message], last: int) -> Answered:
    """Answers as the template marks them.

    Marks that leave out the token which ends a turn are widened by it: without it nothing learns to end.
    """
    template = _template(tokenizer)
    if not tokenizer.is_fast:
        raise DataError("the chat template marks answers, which a tokenizer without offsets cannot follow")
    with _explained("write the conversation"):
        found = tokenizer.apply_chat_template(
            _dicts(messages), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
    ids, mask = list(found["input_ids"]), [bool(said) for said in found["assistant_masks"]]
    if not any(mask):
        raise DataError("the chat template marks no token of this conversation as an answer")
    end = end_of_turn(tokenizer, messages[:last]) if last else tokenizer.eos_token_id
    for index in range(1, len(ids)):
        if mask[index - 1] and not mask[index] and ids[index] == end and ids[index - 1] != end:
            mask[index] = True
    return Answered(ids, mask)


def _by_beginnings(tokenizer: Any, messages: Sequence[Message], turns: Sequence[int]) -> Answered:
    """Answers as what is added to the tokens before them."""
    if turns[0] == 0:
        raise DataError("the conversation begins with an answer, which nothing asks for: begin with the user")
    before = [_text(tokenizer, messages[:turn], True) for turn in turns]
    upto = [_text(tokenizer, messages[: turn + 1], False) for turn in turns]
    ids, *parts = _encode(tokenizer, [_text(tokenizer, messages, False), *before, *upto])
    special = _special(tokenizer)
    mask = [False] * len(ids)
    for turn, head, whole in zip(turns, parts[: len(turns)], parts[len(turns) :], strict=True):
        if whole[: len(head)] != head or len(whole) == len(head):
            raise DataError(
                f"the chat template tokenises what stands before message {turn + 1} otherwise once that "
                "answer stands there, so where it begins cannot be told: the template must mark answers with "
                "{% generation %}, or its prompt for an answer be what an answer begins with"
            )
        if ids[: len(whole)] != whole:
            raise DataError(
                f"the chat template writes message {turn + 1}, an answer, otherwise once message {turn + 2} "
                "follows it, so that it would be learnt as it is never asked for: end the conversation there"
            )
        end = len(whole)
        ends = [index for index in range(len(head), end) if ids[index] in special]
        # A template's line break behind the end token is nothing that the assistant says.
        if ends and not tokenizer.decode(ids[ends[-1] + 1 : end]).strip():
            end = ends[-1] + 1
        mask[len(head) : end] = [True] * (end - len(head))
    return Answered(ids, mask)


def _template(tokenizer: Any) -> str:
    """Return the one template of a tokenizer that may have several."""
    with _explained("be chosen"):
        template = str(tokenizer.get_chat_template())
    return _DAY + template if _DATED in template else template


def _text(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    template = _template(tokenizer)
    with _explained("write the conversation"):
        return str(
            tokenizer.apply_chat_template(
                _dicts(messages),
                chat_template=template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        )


def _dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _special(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what a template raises into one sentence; being programs, templates raise whatever they like."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"the tokenizer's chat template cannot {what}: {said}") from error
