"""One exchange with part of the federation: push, then pull until enough replies or the deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

__all__ = ["Outcome", "converse"]

_POLL_S = (0.02, 0.25)
"""First and longest pause between two looks for replies."""


@dataclass(frozen=True)
class Outcome:
    """What became of one message: a reply's content, or why there is none."""

    node: int
    content: RecordDict | None
    reason: str = ""


def converse(
    grid: Grid,
    contents: Mapping[int, RecordDict],
    *,
    group: str,
    deadline_s: float,
    receive: Callable[[Outcome], RecordDict | None],
    enough: Callable[[], bool],
) -> list[int]:
    """Send one record to each node and hand over the outcomes as they come.

    Args:
        grid: Flower's connection to the nodes.
        contents: a record per Flower node id.
        group: names the exchange in Flower's logs.
        deadline_s: seconds after which missing replies are given up; also the messages' time to live.
        receive: takes each outcome; what it returns, if anything, is sent to the same node once more.
        enough: asked after each outcome; once true the exchange closes.

    Returns:
        The nodes whose reply had not arrived when the exchange closed.
    """
    closes = time.monotonic() + deadline_s
    waiting: dict[str, int] = {}

    def push(node: int, content: RecordDict) -> None:
        message = Message(content, node, "train", ttl=max(closes - time.monotonic(), 1.0), group_id=group)
        # One push per message, so that the identifier in the answer belongs to this node for certain.
        for identifier in grid.push_messages([message]):
            waiting[identifier] = node
            return
        outcome = Outcome(node, None, "the message was refused: is the node still registered?")
        receive(outcome)

    for node, content in contents.items():
        push(node, content)
    pause = _POLL_S[0]
    while waiting and not enough():
        arrived = False
        for message in grid.pull_messages(list(waiting)):
            arrived = True
            node = waiting.pop(message.metadata.reply_to_message_id)
            if message.has_error():
                outcome = Outcome(node, None, f"the client failed: {message.error.reason}")
            else:
                outcome = Outcome(node, message.content)
            again = receive(outcome)
            if again is not None:
                push(node, again)
            if enough():
                break
        if time.monotonic() >= closes:
            break
        pause = _POLL_S[0] if arrived else min(2 * pause, _POLL_S[1])
        if waiting and not arrived:
            time.sleep(pause)
    return sorted(waiting.values())
