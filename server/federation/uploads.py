"""What a node uploads as one reply is counted as its pieces come, and refused before it is kept.

Each request's body has a bound of its own (see :mod:`server.federation.bodies`), but a reply is many
requests. How much it may be in all is told by the run, which knows what it asks for, in a file beside the
SuperLink's database.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.servicer.fleet import fleet_handlers

from fedllm.runs.durable import replace_file

__all__ = ["ANY_REPLY", "LIMITS", "Limits", "Uploads"]

LIMITS = "replies"
"""Folder of the limits, beside the SuperLink's database."""

ANY_REPLY = 64 << 20
"""Bytes of a reply to a run that has not said how much it asks for: one that is none of fedllm's."""

FEW_OBJECTS, SMALL_PIECE = 64, 1 << 20
"""A reply's records, and the least bytes that one piece of an array has: Flower's have 5 MB."""


class Limits:
    """How many bytes a reply to each run may have: files that the runs write and the SuperLink reads.

    A server that starts begins with none: its runs are over.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, run_id: int, most: int) -> None:
        """Let replies to a run have so many bytes."""
        self._folder.mkdir(exist_ok=True, mode=0o700)
        replace_file(self._folder / str(run_id), str(most))

    def of(self, run_id: int) -> int:
        """Return what was set last, or :data:`ANY_REPLY`."""
        try:
            return int((self._folder / str(run_id)).read_text())
        except (FileNotFoundError, ValueError):
            return ANY_REPLY


@dataclass
class _Upload:
    """A reply that a node is uploading.

    Attributes:
        session: Flower's name of the upload.
        run_id: the run that it is for.
        root: id of the object that is the whole reply.
        pending: objects that have not come yet.
        left: bytes that may still come.
    """

    session: str
    run_id: int
    root: str
    pending: int
    left: int


class Uploads:
    """Stands between Flower's Fleet API and its store. A node uploads one reply at a time, as SuperNodes do.

    Args:
        most: returns the bytes that a reply to a run may have.
    """

    def __init__(self, most: Callable[[int], int]) -> None:
        self._most = most
        self._of: dict[int, _Upload] = {}
        self._guard = threading.Lock()
        self._announce: Callable[..., PushMessagesResponse] = fleet_handlers.push_messages
        self._keep: Callable[..., PushObjectResponse] = fleet_handlers.push_object

    def watch(self) -> None:
        """Let Flower's Fleet API go through here."""
        vars(fleet_handlers).update(push_messages=self.announce, push_object=self.keep)

    def announce(self, request: PushMessagesRequest, state: LinkState) -> PushMessagesResponse:
        """Take up a reply; what the node was uploading before is not gone on with."""
        reply, node = request.messages_list[0].metadata, request.node.node_id
        most = self._most(reply.run_id)
        objects = sum(1 for tree in request.message_object_trees for _ in iterate_object_tree(tree))
        if objects > FEW_OBJECTS + most // SMALL_PIECE:
            log(WARNING, "The reply of node_id=%s is refused: it comes in %s pieces", node, objects)
            return PushMessagesResponse()
        response = self._announce(request=request, state=state)
        pending = len(response.objects_to_push)
        upload = _Upload(response.session_id, reply.run_id, reply.message_id, pending, most)
        with self._guard:
            before, self._of[node] = self._of.get(node), upload
        if before is not None and before.root != upload.root:
            _withdraw(before, state)
        return response

    def keep(self, request: PushObjectRequest, state: LinkState) -> PushObjectResponse:
        """Keep a piece of the reply that its node is uploading, unless the reply grows too large with it."""
        node, size = request.node.node_id, len(request.object_content)
        with self._guard:
            upload = self._of.get(node)
            if upload is None or (upload.session, upload.run_id) != (request.session_id, request.run_id):
                return PushObjectResponse(stored=False)
            upload.left -= size
            fits = upload.left >= 0
        if fits:
            response = self._keep(request=request, state=state)
            with self._guard:
                upload.pending -= response.stored
            return response
        reason = f"it has more than the {self._most(upload.run_id)} bytes that a reply to its run may have"
        self.refuse(node, state, reason)
        return PushObjectResponse(stored=False)

    def refuse(self, node: int, state: LinkState, reason: str) -> None:
        """Delete what a node has uploaded of its reply, and take no more of it."""
        with self._guard:
            upload = self._of.pop(node, None)
        if upload is not None:
            log(WARNING, "The reply of node_id=%s to run %s is refused: %s", node, upload.run_id, reason)
            _withdraw(upload, state)


def _withdraw(upload: _Upload, state: Any) -> None:
    """Delete an unfinished reply's objects; who waits for it is told by Flower that it is not available."""
    if upload.pending > 0:
        state._cleanup_push_session(upload.session, cleanup_messages=False)
        state.object_store.delete(upload.root)
