"""How clients come into a run: each introduces itself once, and again if it returns under a new Flower id."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm import wire
from fedllm.config import RunConfig
from fedllm.errors import RunFailed, WireError
from fedllm.store import RunStore
from fedllm.wire import Instruction
from strategies.courier import Courier
from strategies.exchange import converse
from strategies.roster import Member, Roster
from strategies.round_log import RoundLog

__all__ = ["Admission"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""A node that was not admitted is asked again after so long, twice as long each time."""
_QUESTIONS = 4
"""Times that a silent node is asked within a deadline: its introduction may have got lost."""
_POLL_S = 0.5


class Admission:
    """Lets nodes introduce themselves, and waits for clients where a run needs them.

    Args:
        config: the run.
        roster: gets the members.
        courier: learns which version a client holds.
        store: gets an event for every client that joins or is refused.
        say: called with a phase and its numbers while clients are waited for.
    """

    def __init__(
        self, config: RunConfig, roster: Roster, courier: Courier, store: RunStore, say: Callable[..., None]
    ) -> None:
        self._config, self._roster, self._courier = config, roster, courier
        self._store, self._say = store, say
        self._refused: dict[int, tuple[float, float]] = {}
        """By Flower id: when to ask again, and the pause after that."""

    def gather(self, grid: Grid, log: RoundLog) -> list[int]:
        """Wait until every client is there or the deadline is over; return who is, by number.

        Raises:
            RunFailed: fewer than a quorum came.
        """
        config = self._config
        available = self._wait(grid, log, config.clients)
        if len(available) < config.quorum:
            raise RunFailed(
                f"{len(available)} of {config.clients} clients came within server.deadline_s = "
                f"{config.server.deadline_s:g} seconds, the quorum is {config.quorum}"
            )
        return available

    def quorum(self, grid: Grid, log: RoundLog) -> list[int]:
        """Return who is there; gives those who are away a deadline's time to make up the quorum again."""
        return self._wait(grid, log, self._config.quorum)

    def _wait(self, grid: Grid, log: RoundLog, need: int) -> list[int]:
        closes = time.monotonic() + self._config.server.deadline_s
        while True:
            available = self._meet(grid, log)
            if len(available) >= need or time.monotonic() >= closes:
                return available
            self._say("waiting for clients", have=len(available), need=need)
            time.sleep(_POLL_S)

    def _meet(self, grid: Grid, log: RoundLog) -> list[int]:
        """Let whoever is new introduce itself; return the numbers of all that are available."""
        online = list(grid.get_node_ids())
        now = time.monotonic()
        strangers = [
            node for node in self._roster.strangers(online) if self._refused.get(node, (0.0, 0.0))[0] <= now
        ]
        if strangers:
            self._introduce(grid, strangers, online, log)
        return self._roster.available(online)

    def _introduce(self, grid: Grid, strangers: list[int], online: list[int], log: RoundLog) -> None:
        content = wire.pack_instruction(Instruction(run=self._courier.run, kind="describe"))
        known = 0

        def receive(message: Message, flower_id: int) -> None:
            nonlocal known
            known += 1
            self._say("meeting clients", have=known, need=len(strangers))
            try:
                reply = _reply_of(message)
                member = Member(int(reply.metrics.get("node", -1)), flower_id, reply.examples)
                refused = self._roster.admit(member, online) if not reply.error else reply.error
            except WireError as error:
                refused = str(error)
            if refused:
                self._refuse(flower_id, refused)
                return
            log.crossed("down", member.node, "describe", content, payload=0, dense=None)
            log.crossed("up", member.node, "describe", message.content, payload=0, dense=None)
            self._courier.downlink.known.setdefault(member.node, 0)
            facts = dict(reply.facts)
            self._store.node_log(member.node, facts.pop(wire.LOG, ""), round=log.number)
            if facts:
                device = {**reply.metrics, **facts}
                self._store.event("joined", f"client {member.node}", node=member.node, device=device)

        messages = (Message(content, node, "train", group_id="describe") for node in strangers)
        deadline = self._config.server.deadline_s / _QUESTIONS
        converse(grid, messages, receive=receive, enough=lambda: False, deadline_s=deadline)

    def _refuse(self, flower_id: int, reason: str) -> None:
        """Note a node that could not introduce itself, and ask it again later and later."""
        if flower_id not in self._refused:
            self._store.event("refused", f"a node was not admitted: {reason}", flower_id=str(flower_id))
        _, pause = self._refused.get(flower_id, (0.0, _FIRST_PAUSE_S))
        self._refused[flower_id] = (time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE_S))


def _reply_of(message: Message) -> wire.Reply:
    if message.has_error():
        raise WireError(message.error.reason)
    return wire.unpack_reply(message.content)
