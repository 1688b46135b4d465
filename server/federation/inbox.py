"""Replies as they become whole: none holds up the others, and none that cannot be read ends the run.

Flower's SuperLink announces a reply before its objects are uploaded, and Flower's grid then waits for them,
up to two hours, while every other reply lies there unread. Here a reply that is still arriving is looked at
again with the next call. What a node uploads is its own affair until it is put together here; where that goes
wrong the reply has failed, with the reason. And what message a reply answers is taken from the SuperLink,
which knows, not from the reply's own bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Array, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid.http_grid import HttpGrid

__all__ = ["Inbox"]

FORGOTTEN_S = 600.0
"""A reply that nobody has asked for so long is let go of."""
_CUT_SHORT = "its reply was refused by the server (too large, or a piece of it) or its upload was broken off"


@dataclass
class _Arriving:
    """A reply that the SuperLink has announced.

    Attributes:
        root: id of the object that is the whole reply.
        missing: ids of its objects that have not come yet.
        contents: those that have.
        wanted_at: when it was last asked for, on the monotonic clock.
    """

    root: str
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    wanted_at: float = field(default_factory=time.monotonic)


class Inbox:
    """Takes the place of a grid's ``pull_messages``; see :meth:`serve`.

    Args:
        grid: of a deployment.
        most: returns the bytes that a reply may have now.
    """

    def __init__(self, grid: HttpGrid, most: Callable[[], int]) -> None:
        self._grid, self._most = grid, most
        self._arriving: dict[str, _Arriving] = {}
        """By the id of the message that is answered."""

    @classmethod
    def serve(cls, grid: Grid, most: Callable[[], int]) -> None:
        """Let a deployment's grid hand over what an inbox pulls; leave others as they are."""
        if not isinstance(grid, HttpGrid):
            return
        vars(grid)["pull_messages"] = cls(grid, most).pull

    def pull(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages that have arrived whole since the last call, or failed."""
        wanted = dict.fromkeys(message_ids)
        self._forget(wanted.keys())
        if fresh := [asked for asked in wanted if asked not in self._arriving]:
            self._announced(fresh)
        coming = [asked for asked in wanted if asked in self._arriving]
        found = ((asked, self._whole(asked, self._arriving[asked])) for asked in coming)
        arrived = {asked: message for asked, message in found if message is not None}
        for asked in arrived:
            del self._arriving[asked]
        return list(arrived.values())

    def _announced(self, message_ids: Sequence[str]) -> None:
        request = PullAppMessagesRequest(message_ids=message_ids)
        response = self._grid._runtime_client.PullMessages(request)
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            objects = dict.fromkeys(node.object_id for node in iterate_object_tree(tree))
            reply = _Arriving(message.metadata.message_id, list(objects))
            self._arriving[message.metadata.reply_to_message_id] = reply

    def _whole(self, asked: str, reply: _Arriving) -> Message | None:
        """Fetch what has come of a reply; return it once that is all, or an error in its place."""
        reply.wanted_at = time.monotonic()
        while reply.missing:
            request = PullObjectRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, object_id=reply.missing[-1]
            )
            answer = self._grid._runtime_client.PullObject(request)
            if not answer.object_found:
                return self._failed(asked, _CUT_SHORT)
            if not answer.object_available:
                return None
            reply.contents[reply.missing.pop()] = answer.object_content
        self._confirm(reply)
        try:
            if (size := _unpacked(reply.contents)) > self._most():
                return self._failed(asked, f"its reply unpacks to {size} bytes; it may have {self._most()}")
            made = inflate_object_from_contents(reply.root, reply.contents)
            if not isinstance(made, Message):
                raise TypeError(f"it is a {type(made).__name__}")
        except Exception as error:  # of whatever kind: it came of bytes that one node sent
            return self._failed(asked, f"its reply cannot be read ({type(error).__name__}: {error})")
        made.metadata.__dict__.update(_message_id=reply.root, _reply_to_message_id=asked)
        return made

    def _forget(self, wanted: Collection[str]) -> None:
        oldest = time.monotonic() - FORGOTTEN_S
        for asked, reply in list(self._arriving.items()):
            if asked not in wanted and reply.wanted_at < oldest:
                del self._arriving[asked]
                self._confirm(reply)

    def _confirm(self, reply: _Arriving) -> None:
        """Let the SuperLink forget a reply."""
        request = ConfirmMessageReceivedRequest(
            node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=reply.root
        )
        self._grid._runtime_client.ConfirmMessageReceived(request)

    def _failed(self, asked: str, reason: str) -> Message:
        here = self._grid.node.node_id
        metadata = Metadata(
            run_id=self._grid.run.run_id,
            message_id="",
            src_node_id=here,
            dst_node_id=here,
            message_type=SYSTEM_MESSAGE_TYPE,
            group_id="",
            ttl=0,
            reply_to_message_id=asked,
            created_at=now().timestamp(),
        )
        return make_message(metadata=metadata, error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=reason))


def _unpacked(contents: Mapping[str, bytes]) -> int:
    """Return the bytes of a reply's arrays once put together: one may name the same piece many times."""
    size = 0
    for content in contents.values():
        kind, pieces, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            order = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            size += sum(len(contents[pieces[place]]) for place in order)
    return size
