"""Rounds of mode ``async``: a fixed number of clients is at work, and every so many answers make a commit.

FedBuff (Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022):

    whenever fewer than ``concurrency`` clients are at work     ask one, from the tensors as they are now
    whenever an answer comes                                    weigh it by its staleness, add it to a buffer
    whenever the buffer holds ``buffer`` of them                commit, and empty it

A client is at work once at a time and counts once a commit; who failed is asked again after the next. So what
a client keeps from one update to the next, residuals and the like, means what it means in synchronous rounds,
and where the buffer and the concurrency are all clients the rounds are synchronous ones.

In a simulation a client's answer is computed when it is asked, and counted when the clock of its device says
so: the next to count is the earliest of all that are at work, of which none is still being computed. In
a deployment answers count as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.protocol import wire
from fedllm.protocol.wire import STALE
from fedllm.runs.writer import RunStore
from server.rounds.exchange.conversation import FIRST_PAUSE_S, LONGEST_PAUSE_S, Conversation
from server.rounds.exchange.messages import OpenExchange
from server.rounds.roster import Roster, sample
from server.rounds.state import Flight, ServerState
from server.rounds.timing.clock import Clock, departure

__all__ = ["Buffered"]


class Buffered:
    """Keeps clients at work over the rounds of a run.

    Args:
        config: the run.
        state: holds who is at work.
        roster: knows under which id each client is reached.
        store: is told of clients whose host gave no answer.
        clock: of simulated devices; None in a deployment.
        patience_s: seconds after which a silent client is given up; in a simulation since anybody's answer.
        message: writes the open exchange's question to a client.
        take: takes in one reply to it; may return a question to ask again.
        look: called now and then while nothing comes.
        say: called with the phase and its numbers.
    """

    def __init__(
        self,
        config: RunConfig,
        state: ServerState,
        roster: Roster,
        store: RunStore,
        clock: Clock | None,
        patience_s: float,
        *,
        message: Callable[[int], Message],
        take: Callable[[int, Message], Message | None],
        look: Callable[[Grid], None],
        say: Callable[..., None],
    ) -> None:
        self._config, self._state, self._roster, self._store = config, state, roster, store
        self._clock, self._patience_s = clock, patience_s
        self._message, self._take, self._look, self._say = message, take, look, say
        self._talk: Conversation | None = None
        self._down: dict[int, int] = {}
        """Bytes of the questions that were asked last."""

    def fill(self, grid: Grid, opened: OpenExchange) -> None:
        """Ask and count until the exchange has all it wants, or until nobody is at work or can be asked."""
        self._talk = talk = self._talk or Conversation(grid)
        flights = self._state.flights
        self._recall(talk, opened)
        chosen = 0
        self._tell(opened, urgent=True)
        while opened.missing:
            chosen += self._ask(talk, opened, chosen)
            if not flights:
                return
            self._hear(grid, talk, opened)
            if any(flight.answer for flight in flights.values()):
                self._count(talk, opened)
                self._tell(opened)

    def _recall(self, talk: Conversation, opened: OpenExchange) -> None:
        """Go on with those who are at work since earlier rounds, but for those who cannot answer any more."""
        for node, flight in sorted(self._state.flights.items()):
            opened.begun[node] = flight.begun
            opened.log.asked_before(node, flight.asked)
            member = self._roster.members.get(node)
            if node in self._roster.quarantined:
                self._drop(talk, opened, node, "unused", "the operator has set it aside")
            elif not flight.answer and (member is None or member.flower_id != flight.flower_id):
                self._drop(talk, opened, node, "failed", "it was started anew while it was at work")
                opened.answered.discard(node)

    def _drop(self, talk: Conversation, opened: OpenExchange, node: int, status: str, reason: str) -> None:
        """Give up what a client is at; it is not asked again in this round."""
        talk.forget(self._state.flights.pop(node).flower_id)
        opened.answered.add(node)
        opened.log.outcome(node, opened.exchange.kind, status, reason=reason)  # type: ignore[arg-type]

    def _ask(self, talk: Conversation, opened: OpenExchange, chosen: int) -> bool:
        """Put clients to work where too few are; returns whether there was anything to choose."""
        busy, clock = self._state.flights, self._clock
        able = [
            node
            for node in opened.nodes
            if node not in busy and node not in opened.answered and (clock is None or clock.stays(node))
        ]
        free = self._config.cohort - len(busy)
        if free <= 0 or not able:
            return False
        again = (chosen,) if chosen else ()
        for node in sample(able, free, self._config.seed, opened.log.number, *again):
            message = self._message(node)
            self._down[node] = wire.size(message.content)
            self._send(talk, opened, node, message)
        return True

    def _send(self, talk: Conversation, opened: OpenExchange, node: int, message: Message) -> None:
        asked = time.monotonic() if self._clock is None else self._clock.now
        self._state.flights[node] = Flight(opened.begun[node], asked, message.metadata.dst_node_id)
        talk.ask(message)

    def _hear(self, grid: Grid, talk: Conversation, opened: OpenExchange) -> None:
        """Wait for an answer; in a simulation for those of all, since any of them may be the earliest."""
        flights, heard = self._state.flights, time.monotonic()
        pause = FIRST_PAUSE_S
        while waiting := [node for node, flight in flights.items() if not flight.answer]:
            if self._clock is None and len(waiting) < len(flights):
                return
            if talk.listen(lambda message, asked: self._arrive(opened, message, asked)):
                heard, pause = time.monotonic(), FIRST_PAUSE_S
                continue
            self._give_up(talk, opened, waiting, heard)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            self._look(grid)

    def _arrive(self, opened: OpenExchange, message: Message, asked: int) -> Message | None:
        """Note an answer and when it counts; may return a question to ask again."""
        flights = self._state.flights
        node = next((n for n, f in flights.items() if f.flower_id == asked and not f.answer), None)
        if node is None:
            return None
        if not message.has_content():
            del flights[node]
            return self._take(node, message)
        if wire.failure_of(message.content) == STALE and node not in opened.resent:
            again = self._take(node, message)
            flights[node].begun = opened.begun[node]
            return again
        self._note(opened, node, flights[node], message.content)
        return None

    def _note(self, opened: OpenExchange, node: int, flight: Flight, content: RecordDict) -> None:
        flight.answer = wire.encode(content)
        if self._clock is None:
            flight.ends = time.monotonic()
            return
        seconds, _, answers = self._clock.heard(node, opened, self._down[node], content)
        if seconds > self._clock.deadline_s:
            flight.status, flight.reason = "late", self._clock.lateness(node, seconds)
        elif not answers:
            flight.status, flight.reason = "failed", departure(seconds)
        flight.ends = flight.asked + min(seconds, self._clock.deadline_s)

    def _count(self, talk: Conversation, opened: OpenExchange) -> None:
        """Count the earliest answer, or the earliest client that has none to give any more."""
        flights = self._state.flights
        node = min((n for n, f in flights.items() if f.answer), key=lambda n: (flights[n].ends, n))
        flight = flights[node]
        if self._clock is not None:
            self._clock.now = max(self._clock.now, flight.ends)
            opened.log.simulated[node] = flight.ends - flight.asked
        if flight.status:
            self._drop(talk, opened, node, flight.status, flight.reason)
            return
        del flights[node]
        flower_id = self._roster.members[node].flower_id
        again = self._take(node, Message(wire.decode(flight.answer), flower_id, "train"))
        if again is not None:
            self._send(talk, opened, node, again)

    def _give_up(
        self, talk: Conversation, opened: OpenExchange, waiting: Collection[int], heard: float
    ) -> None:
        """Go on without clients that have been silent for too long."""
        now, flights = time.monotonic(), self._state.flights
        since = {node: heard if self._clock else flights[node].asked for node in waiting}
        silent = [node for node, at in since.items() if now - at > self._patience_s]
        for node in silent:
            self._drop(talk, opened, node, "late", "no reply before the deadline")
        if silent and self._clock is not None:
            sentence = (
                f"round {opened.log.number} goes on without {len(silent)} of its clients, as none answered "
                f"for {self._patience_s:g} seconds: a faster machine comes to other numbers"
            )
            self._store.event("warning", sentence, round=opened.log.number, nodes=silent)

    def _tell(self, opened: OpenExchange, *, urgent: bool = False) -> None:
        self._say(
            opened.exchange.kind,
            round=opened.log.number,
            rounds=self._config.rounds,
            have=len(opened.accepted),
            need=opened.wanted,
            closes_at=time.time() + self._patience_s,
            urgent=urgent,
        )
