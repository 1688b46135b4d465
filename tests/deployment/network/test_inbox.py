"""A reply that is still arriving, or that cannot be put together, keeps no other from being read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid

from server.federation import inbox
from server.federation.inbox import Inbox


class SuperLink:
    """Holds two replies, to the messages ``good`` and ``bad``, and announces each once.

    Attributes:
        spoil: makes of the objects of the bad reply what is uploaded; what it leaves out is still to come.
        withdrawn: whether the bad reply has been deleted.
        confirmed: replies that may be forgotten.
        asked: how often an object was asked for.
    """

    def __init__(self, spoil: Callable[[str, dict[str, bytes]], None]) -> None:
        self.objects: dict[str, bytes] = {}
        self.withdrawn, self.asked = False, 0
        self.confirmed: list[str] = []
        self._protos, self._trees, self._bad = dict[str, Any](), dict[str, Any](), set[str]()
        for asked in ("good", "bad"):
            question = Message(RecordDict(), 7, "train")
            question.metadata.__dict__["_message_id"] = asked
            reply = Message(RecordDict({"c": ConfigRecord({"said": asked})}), reply_to=question)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            self._protos[asked] = message_to_proto(remove_content_from_message(reply))
            self._trees[asked] = get_object_tree(reply)
            made = {key: item.deflate() for key, item in get_all_nested_objects(reply).items()}
            if asked == "bad":
                self._bad, self.whole = set(made), dict(made)
                spoil(reply.object_id, made)
            self.objects |= made

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        found = [asked for asked in request.message_ids if asked in self._protos]
        return PullAppMessagesResponse(
            messages_list=[self._protos.pop(asked) for asked in found],
            message_object_trees=[self._trees.pop(asked) for asked in found],
        )

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        self.asked += 1
        if self.withdrawn and request.object_id in self._bad:
            return PullObjectResponse(object_found=False)
        content = self.objects.get(request.object_id, b"")
        return PullObjectResponse(object_found=True, object_available=bool(content), object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)


def grid_of(link: SuperLink) -> http_grid.HttpGrid:
    grid = http_grid.HttpGrid("127.0.0.1:1", insecure=True, token="t")
    grid._client = link  # type: ignore[assignment]
    grid.set_run(Run.create_empty(1))
    return grid


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID


def of_no_class(root: str, objects: dict[str, bytes]) -> None:
    objects[root] = objects[root].replace(b"Message", b"Nothing", 1)


def still_coming(root: str, objects: dict[str, bytes]) -> None:
    del objects[root]


def test_flower_alone_ends_there() -> None:
    with pytest.raises((KeyError, ValueError)):
        list(grid_of(SuperLink(of_no_class)).pull_messages(["good", "bad"]))


def test_one_unreadable_reply_has_failed_and_the_others_arrive() -> None:
    grid = grid_of(SuperLink(of_no_class))
    Inbox.serve(grid, lambda: 10_000)
    found = {message.metadata.reply_to_message_id: message for message in grid.pull_messages(["good", "bad"])}
    assert set(found) == {"good", "bad"}
    assert found["good"].content["c"]["said"] == "good"
    assert found["bad"].has_error()
    assert "its reply cannot be read (KeyError" in found["bad"].error.reason


def test_a_reply_that_is_still_arriving_holds_up_no_other() -> None:
    """Flower's own grid would not return from here for two hours."""
    link = SuperLink(still_coming)
    grid = grid_of(link)
    Inbox.serve(grid, lambda: 10_000)
    (good,) = grid.pull_messages(["good", "bad"])
    assert good.metadata.reply_to_message_id == "good"
    asked = link.asked
    assert list(grid.pull_messages(["bad"])) == []
    assert link.asked == asked + 1
    link.objects |= link.whole
    (late,) = grid.pull_messages(["bad"])
    assert late.content["c"]["said"] == "bad"
    assert len(link.confirmed) == 2


def test_a_reply_that_is_withdrawn_has_failed_at_once() -> None:
    link = SuperLink(still_coming)
    grid = grid_of(link)
    Inbox.serve(grid, lambda: 10_000)
    list(grid.pull_messages(["good", "bad"]))
    link.withdrawn = True
    (bad,) = grid.pull_messages(["bad"])
    assert bad.metadata.reply_to_message_id == "bad"
    assert "refused by the server (too large" in bad.error.reason


def test_what_nobody_asks_for_any_more_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    link = SuperLink(still_coming)
    grid = grid_of(link)
    Inbox.serve(grid, lambda: 10_000)
    list(grid.pull_messages(["good", "bad"]))
    list(grid.pull_messages(["other"]))
    assert len(link.confirmed) == 1
    monkeypatch.setattr(inbox, "FORGOTTEN_S", -1.0)
    list(grid.pull_messages(["other"]))
    assert len(link.confirmed) == 2
