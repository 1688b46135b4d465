"""Talking with part of the federation: push, then pull until enough replies or the deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

__all__ = ["converse"]

_POLL_S = (0.02, 0.25)
"""First and longest pause between two looks for replies."""


def converse(
    grid: Grid,
    messages: Iterable[Message],
    *,
    receive: Callable[[Message, int], Message | None],
    enough: Callable[[], bool],
    deadline_s: float,
) -> set[int]:
    """Send messages and hand over the replies as they come.

    Args:
        grid: Flower's connection to the nodes.
        messages: at most one per node; pushed as they are produced, so that they need not all be held.
        receive: takes each reply and the Flower id of the node that was asked, which is not the reply's
            source where the SuperLink answers for a node that has gone; what it returns is sent as well.
        enough: asked after each reply; once true the exchange closes.
        deadline_s: seconds after which missing replies are given up.

    Returns:
        Flower ids of the nodes whose reply had not arrived when the exchange closed.
    """
    closes = time.monotonic() + deadline_s
    waiting: dict[str, int] = {}

    def push(message: Message) -> None:
        # One at a time: a grid leaves out the identifiers of messages that it refuses.
        for identifier in grid.push_messages([message]):
            waiting[identifier] = message.metadata.dst_node_id

    silent: set[int] = set()
    for message in messages:
        silent.add(message.metadata.dst_node_id)
        push(message)
    pause = _POLL_S[0]
    while waiting and not enough() and time.monotonic() < closes:
        arrived = False
        for reply in grid.pull_messages(list(waiting)):
            arrived = True
            asked = waiting.pop(reply.metadata.reply_to_message_id)
            silent.discard(asked)
            again = receive(reply, asked)
            if again is not None:
                silent.add(again.metadata.dst_node_id)
                push(again)
            if enough():
                break
        pause = _POLL_S[0] if arrived else min(2 * pause, _POLL_S[1])
        if waiting and not arrived:
            time.sleep(pause)
    return silent
