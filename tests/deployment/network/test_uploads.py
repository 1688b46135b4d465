"""A reply is bounded as a whole, whatever its pieces are: Flower's store and handlers, in this process."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.grid import http_grid
from flwr.superlink.servicer.runtime import runtime_handlers

from server.federation.inbox import Inbox
from server.federation.uploads import ANY_REPLY, Limits, Uploads
from tests.parts import quick

MIB = 1 << 20


class Link:
    """A SuperLink without its HTTP: one run, some nodes, and the run's grid with its inbox."""

    def __init__(self, most: Callable[[int], int], nodes: int = 2) -> None:
        _, factory = get_objectstore_linkstate_factories(":flwr-in-memory:", get_federation_manager())
        self.state: Any = factory.state()
        self.uploads = Uploads(most)
        self.nodes = [
            self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, f"key {k}".encode(), 30.0)
            for k in range(nodes)
        ]
        for node in self.nodes:
            assert self.state.activate_node(node, 30.0)
        self.run_id = self.state.create_run(
            "p/a", "1", "hash", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp"
        )
        (self.task,) = self.state.get_tasks(run_ids=[self.run_id])
        assert self.state.claim_task(self.task.task_id)
        assert self.state.activate_task(self.task.task_id)
        TaskIdentity.run_id, TaskIdentity.task_id = self.run_id, self.task.task_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self.grid = http_grid.HttpGrid("127.0.0.1:1", insecure=True, token="t")
        self.grid._client = self  # type: ignore[assignment]
        self.grid.set_run(Run.create_empty(self.run_id))
        Inbox.serve(self.grid, lambda: most(self.run_id))

    def __getattr__(self, name: str) -> Any:
        """Answer the grid's calls as the SuperLink's Runtime API does."""
        handlers = {
            "PushMessages": runtime_handlers.push_messages,
            "PullMessages": runtime_handlers.pull_messages,
            "PushObject": runtime_handlers.push_object,
            "PullObject": runtime_handlers.pull_object,
            "ConfirmMessageReceived": runtime_handlers.confirm_message_received,
        }
        return lambda request: handlers[name](request, self.state, self.task)

    def ask(self, node: int) -> tuple[str, Message]:
        """Ask a node something; returns the question's id, and the question."""
        question = Message(RecordDict({"q": ConfigRecord({"node": node})}), self.nodes[node], "train")
        (identifier,) = self.grid.push_messages([question])
        (delivered,) = self.state.get_message_ins(node_id=self.nodes[node], limit=1)
        return identifier, delivered

    def kept(self) -> int:
        """Bytes in the store."""
        objects = vars(self.state.object_store)["store"].values()
        return sum(len(entry.content) for entry in objects)


class Reply:
    """What a node says of itself in pieces, as a SuperNode does."""

    def __init__(
        self, link: Link, node: int, question: Message, size: int, data: bytes | None = None
    ) -> None:
        self.link, self.node = link, Node(node_id=link.nodes[node])
        TaskIdentity.node_id = link.nodes[node]
        data = random.Random(node).randbytes(size) if data is None else data
        array = Array(dtype="uint8", shape=(size,), stype="raw", data=data)
        self.message = Message(RecordDict({"p": ArrayRecord({"x": array})}), reply_to=question)
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        with no_object_id_recompute():
            self.message.metadata.__dict__["_message_id"] = self.message.object_id
            self.tree = get_object_tree(self.message)
            self.pieces = {key: item.deflate() for key, item in get_all_nested_objects(self.message).items()}

    def announce(self, tree: ObjectTree | None = None) -> None:
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(self.message))],
            message_object_trees=[self.tree if tree is None else tree],
        )
        self.response = self.link.uploads.announce(request, self.link.state)

    def push(self, object_id: str, session: str | None = None) -> bool:
        request = PushObjectRequest(
            node=self.node,
            run_id=self.link.run_id,
            object_id=object_id,
            object_content=self.pieces[object_id],
            session_id=self.response.session_id if session is None else session,
        )
        return self.link.uploads.keep(request, self.link.state).stored

    def upload(self) -> list[bool]:
        self.announce()
        return [self.push(object_id) for object_id in self.response.objects_to_push]


def pulled(link: Link, *identifiers: str) -> dict[str, Message]:
    return {m.metadata.reply_to_message_id: m for m in link.grid.pull_messages(identifiers)}


def test_a_reply_within_the_bound_arrives() -> None:
    link = Link(lambda run: 12 * MIB)
    asked, question = link.ask(0)
    reply = Reply(link, 0, question, 11 * MIB)
    assert len(reply.pieces) > 5
    assert all(reply.upload())
    arrived = pulled(link, asked)[asked]
    assert arrived.content["p"]["x"].data == reply.message.content["p"]["x"].data
    assert link.kept() < MIB


@pytest.mark.parametrize("announced_first", quick([True, False], False))
def test_a_reply_beyond_the_bound_is_deleted_and_has_failed_at_once(announced_first: bool) -> None:
    """Whether or not the run has heard of it already; the next reply of the same node is as good as any."""
    link = Link(lambda run: 6 * MIB)
    asked, question = link.ask(0)
    reply = Reply(link, 0, question, 40 * MIB)
    reply.announce()
    if announced_first:
        assert pulled(link, asked) == {}
    stored = [reply.push(object_id) for object_id in reply.response.objects_to_push]
    assert 0 < sum(stored) < len(stored) / 2
    assert not any(stored[stored.index(False) :])
    assert link.kept() < 1000  # the question
    failed: dict[str, Message] = {}
    for _ in range(2):
        failed |= pulled(link, asked)
    assert failed[asked].has_error()
    asked, question = link.ask(0)
    assert all(Reply(link, 0, question, MIB).upload())
    assert not pulled(link, asked)[asked].has_error()


def test_an_endless_reply_keeps_no_other_from_being_read() -> None:
    link = Link(lambda run: 12 * MIB)
    (slow, first), (quick, second) = link.ask(0), link.ask(1)
    Reply(link, 0, first, 10 * MIB).announce()
    assert all(Reply(link, 1, second, MIB).upload())
    assert set(pulled(link, slow, quick)) == {quick}


def test_a_node_adds_nothing_to_another_nodes_reply() -> None:
    link = Link(lambda run: 12 * MIB)
    _, question = link.ask(0)
    reply = Reply(link, 0, question, MIB)
    reply.announce()
    (piece, *_) = reply.response.objects_to_push
    reply.node = Node(node_id=link.nodes[1])
    assert not reply.push(piece)
    reply.node = Node(node_id=link.nodes[0])
    assert not reply.push(piece, session="")
    assert reply.push(piece)


def test_a_reply_that_is_not_gone_on_with_makes_room_for_the_next() -> None:
    link = Link(lambda run: 12 * MIB)
    asked, question = link.ask(0)
    reply = Reply(link, 0, question, 10 * MIB)
    reply.announce()
    for object_id in list(reply.response.objects_to_push)[:-1]:
        assert reply.push(object_id)
    _, another = link.ask(0)
    Reply(link, 0, another, MIB).announce()
    assert link.kept() < MIB
    failed: dict[str, Message] = {}
    for _ in range(2):
        failed |= pulled(link, asked)
    assert failed[asked].has_error()


def test_a_reply_that_is_whole_stays_when_the_next_is_announced() -> None:
    link = Link(lambda run: 12 * MIB)
    asked, question = link.ask(0)
    assert all(Reply(link, 0, question, MIB).upload())
    _, another = link.ask(0)
    Reply(link, 0, another, 2 * MIB).announce()
    assert not pulled(link, asked)[asked].has_error()


def test_a_reply_in_countless_pieces_is_refused_before_it_is_announced() -> None:
    link = Link(lambda run: 2 * MIB)
    asked, question = link.ask(0)
    reply, held = Reply(link, 0, question, MIB), len(link.state.object_store)
    many = [ObjectTree(object_id=f"{number:064x}") for number in range(500)]
    reply.announce(ObjectTree(object_id=reply.message.object_id, children=many))
    assert list(reply.response.objects_to_push) == []
    assert len(link.state.object_store) == held
    assert pulled(link, asked) == {}


def test_a_refused_piece_ends_its_reply() -> None:
    """As when a piece is larger than a request may be: the rest is not waited for."""
    link = Link(lambda run: 12 * MIB)
    asked, question = link.ask(0)
    reply = Reply(link, 0, question, 10 * MIB)
    reply.announce()
    assert pulled(link, asked) == {}
    link.uploads.refuse(link.nodes[0], link.state, "a piece of it is too large")
    assert "refused by the server" in pulled(link, asked)[asked].error.reason
    assert not reply.push(reply.message.object_id)


def test_a_reply_that_unpacks_to_more_is_not_unpacked() -> None:
    """An array may name one piece of 5 MB as often as it likes: here 8 times; 1 MB holds 300,000."""
    link = Link(lambda run: 12 * MIB)
    asked, question = link.ask(0)
    reply = Reply(link, 0, question, 40 * MIB, data=bytes(40 * MIB))
    assert all(reply.upload())
    assert link.kept() < 6 * MIB
    (failed,) = pulled(link, asked).values()
    assert failed.error.reason.startswith("its reply unpacks to 4194")
    assert failed.error.reason.endswith("bytes; it may have 12582912")


def test_limits_are_what_the_run_says(tmp_path: Path) -> None:
    limits = Limits(tmp_path / "replies")
    assert limits.of(7) == ANY_REPLY
    limits.set(7, 5 * MIB)
    assert (limits.of(7), limits.of(8)) == (5 * MIB, ANY_REPLY)
    (tmp_path / "replies" / "7").write_text("much")
    assert limits.of(7) == ANY_REPLY


def test_pieces_that_come_at_once_are_counted_together() -> None:
    link = Link(lambda run: 6 * MIB)
    _, question = link.ask(0)
    reply = Reply(link, 0, question, 40 * MIB)
    reply.announce()
    threads = [
        threading.Thread(target=reply.push, args=(object_id,)) for object_id in reply.response.objects_to_push
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert link.kept() < 1000  # the question
