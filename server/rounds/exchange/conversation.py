"""Talking with part of the federation: push, then pull until enough replies or the deadline.

In a simulation how fast the host is decides nothing: nobody is late who waits for a turn, and nobody counts
for being first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice

from flwr.app import Message
from flwr.serverapp import Grid

__all__ = ["Conversation", "converse"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.25
"""First and longest pause between two looks for replies."""
_LOOK_S = 2.0
"""Between two looks at who is still there."""

Receive = Callable[[Message, int], Message | None]
"""Takes a reply and the Flower id of the node that was asked; what it returns is sent as well."""


class Conversation:
    """Questions to nodes, open until they are answered: an answer counts however late it comes.

    Args:
        grid: Flower's connection to the nodes.

    Attributes:
        silent: Flower ids of the nodes that were asked and have not answered.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._waiting: dict[str, int] = {}
        self.silent: set[int] = set()

    @property
    def open(self) -> int:
        """Questions to which an answer may still come."""
        return len(self._waiting)

    def ask(self, message: Message) -> None:
        """Push one message."""
        self.silent.add(message.metadata.dst_node_id)
        # One at a time: a grid leaves out the identifiers of messages that it refuses.
        for identifier in self._grid.push_messages([message]):
            self._waiting[identifier] = message.metadata.dst_node_id

    def forget(self, flower_id: int) -> None:
        """Wait no longer for a node: what it still answers is left where it is."""
        self._waiting = {message: node for message, node in self._waiting.items() if node != flower_id}
        self.silent.discard(flower_id)

    def listen(self, receive: Receive, enough: Callable[[], bool] = lambda: False) -> bool:
        """Hand over the replies that have come since the last call; returns whether there were any.

        Args:
            receive: takes each reply and the Flower id of the node that was asked, which is not the reply's
                source where the SuperLink answers for a node that has gone.
            enough: asked after each reply; once true the rest is left.
        """
        arrived = False
        for reply in self._grid.pull_messages(list(self._waiting)) if self._waiting else ():
            arrived = True
            asked = self._waiting.pop(reply.metadata.reply_to_message_id, None)
            if asked is None:  # what a message says that it answers is written by its sender
                continue
            self.silent.discard(asked)
            again = receive(reply, asked)
            if again is not None:
                self.ask(again)
            if enough():
                break
        return arrived


def converse(
    grid: Grid,
    messages: Iterable[Message],
    *,
    receive: Receive,
    missing: Callable[[], int],
    deadline_s: float,
    simulated: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> set[int]:
    """Send messages and hand over the replies as they come.

    Args:
        grid: Flower's connection to the nodes.
        messages: at most one per node; pushed as they are produced, so that they need not all be held.
        receive: see :meth:`Conversation.listen`.
        missing: replies that are still needed; asked after each. At 0 the exchange closes.
        deadline_s: seconds after which missing replies are given up.
        simulated: whether clients share this host. The deadline then starts anew with each reply, and no more
            questions are open than replies are missing: the rest is asked where some came to nothing.
        meanwhile: called every few seconds in which nothing comes.

    Returns:
        Flower ids of the nodes that were asked and whose reply had not arrived when the exchange closed.
    """
    talk, left = Conversation(grid), iter(messages)

    def ask() -> None:
        for message in islice(left, max(missing() - talk.open, 0)) if simulated else left:
            talk.ask(message)

    closes = time.monotonic() + deadline_s
    ask()
    pause, looked = FIRST_PAUSE_S, time.monotonic()
    while talk.open and missing() > 0 and time.monotonic() < closes:
        arrived = talk.listen(receive, lambda: missing() <= 0)
        if arrived and simulated:
            closes = time.monotonic() + deadline_s
            ask()
        pause = FIRST_PAUSE_S if arrived else min(2 * pause, LONGEST_PAUSE_S)
        if talk.open and not arrived:
            time.sleep(pause)
            if time.monotonic() - looked > _LOOK_S:
                meanwhile()
                looked = time.monotonic()
    return talk.silent
