"""How clients come into a run: each introduces itself once, and again if it returns under a new Flower id."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.errors import RunFailed, WireError
from fedllm.protocol import claims, wire
from fedllm.protocol.wire import Instruction
from fedllm.runs.records import OWN, TEXTS
from fedllm.runs.writer import RunStore
from server.rounds.exchange.conversation import LONGEST_PAUSE_S, Conversation
from server.rounds.exchange.intake import refusal
from server.rounds.exchange.messages import Messages
from server.rounds.orders import Orders
from server.rounds.roster import Member, Roster
from server.rounds.round_log import RoundLog
from strategies.likeness import MODEL, require_alike

__all__ = ["Admission", "Proven"]

Proven = Callable[[], Mapping[int, int]]
"""Returns the client's number that each node's key stands for, by Flower id."""

_SECOND_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""A node that was not admitted is asked again at once, which tells it why, then after so long, and twice as
long each time."""
_QUESTIONS = 4
"""Times that a silent node is asked within the first deadline or two: a question may have got lost."""
_LONGEST_LOADING_S = 3600.0
"""So long a silent node counts as loading: a device waits no longer for its own worker either."""
_POLL_S = 0.5


@dataclass
class _Question:
    """To a node that has not answered yet.

    Attributes:
        content: what it was asked.
        first: when it was asked first, on the monotonic clock.
        again: when to ask it again.
        pause: seconds between the two times after that.
    """

    content: RecordDict
    first: float
    again: float
    pause: float


@dataclass
class _Refusal:
    """A node that could not introduce itself.

    Attributes:
        reason: as the node is told.
        sentence: as an operator is told.
        again: when to ask it again.
        pause: seconds until the time after that.
    """

    reason: str
    sentence: str
    again: float
    pause: float


class Admission:
    """Lets nodes introduce themselves, and waits for clients where a run needs them.

    Args:
        config: the run.
        roster: gets the members.
        messages: learns which version a client holds.
        orders: obeyed while clients are waited for.
        store: gets an event for every client that joins, is refused, leaves or comes back.
        say: called with a phase and its numbers while clients are waited for.
        proven: what nodes' keys prove; None where there are none, as in a simulation: numbers are believed.
        shared: what each client has to have in common with the server; None compares nothing.
        deadline_s: seconds for which clients are waited for; unset takes ``server.deadline_s``.
    """

    def __init__(
        self,
        config: RunConfig,
        roster: Roster,
        messages: Messages,
        orders: Orders,
        store: RunStore,
        say: Callable[..., None],
        proven: Proven | None = None,
        shared: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self._deadline_s = config.server.deadline_s if deadline_s is None else deadline_s
        self._config, self._roster, self._messages = config, roster, messages
        self._orders, self._store, self._say, self._proven = orders, store, say, proven
        self._shared = shared
        self._away: set[int] = set()
        self._talk: Conversation | None = None
        self._asked: dict[int, _Question] = {}
        """By Flower id: nodes that are there and have not answered, because they are still loading."""
        self._refused: dict[int, _Refusal] = {}
        """By Flower id: nodes that are not admitted, as far as they have not been since."""
        self._numbers: Mapping[int, int] = {}
        """What nodes' keys proved when somebody was last asked."""

    def gather(self, grid: Grid, log: RoundLog) -> list[int]:
        """Wait until every client that is not quarantined is there; return who is.

        The deadline is for those that are not online: who is online and has not introduced itself is loading
        its model, and is waited for.

        Raises:
            RunFailed: fewer than a quorum came.
        """
        config = self._config
        available = self._wait(grid, log, lambda: config.clients - len(self._roster.quarantined))
        # Who has declared texts was there before the run was interrupted.
        loading = set(self._loading_numbers())
        self._note_absence(set(self._roster.declared) - set(self._roster.members) - loading)
        if len(available) < config.quorum and not self._orders.stop:
            raise RunFailed(
                f"{len(available)} of {config.clients} clients came within server.deadline_s = "
                f"{self._deadline_s:g} seconds, the quorum is {config.quorum}{self._why(grid)}"
            )
        return available

    def _why(self, grid: Grid) -> str:
        """Say who is not there, and what keeps nodes out that are."""
        reasons = []
        online = set(grid.get_node_ids())
        mine = {number: flower for flower, number in self._numbers.items() if number < self._config.clients}
        if away := sorted(number for number, flower in mine.items() if flower not in online):
            reasons.append(f"not online: {_named(away)}")
        if silent := [flower for flower in self._asked if self._may_count(flower)]:
            numbers = sorted(self._numbers[flower] for flower in silent if flower in self._numbers)
            told = _named(numbers) if numbers else f"{len(silent)} nodes"
            reasons.append(f"online, but silent for {_LONGEST_LOADING_S / 60:.0f} minutes: {told}")
        if self._refused:
            first, *others = self._refused.values()
            reasons.append(first.sentence + (f" (and {len(others)} more)" if others else ""))
        return "".join(f"; {reason}" for reason in reasons)

    def quorum(self, grid: Grid, log: RoundLog) -> list[int]:
        """Return who is there; gives those who are away a deadline's time to make up the quorum again.

        Who has just come is given a part of that to introduce itself, so that it takes part at once; after
        that no round waits for it, and it joins whichever comes next.
        """
        courtesy = self._deadline_s / _QUESTIONS
        return self._wait(grid, log, lambda: self._config.quorum, courtesy)

    def look(self, grid: Grid) -> None:
        """Note which clients have left, and which have come back."""
        online = set(grid.get_node_ids())
        members = self._roster.members
        here = {node for node, member in members.items() if member.flower_id in online}
        for node in sorted(self._away & here):
            self._store.event("back", f"client {node} is back", node=node)
        self._away -= here
        self._note_absence(set(members) - here)

    def _note_absence(self, away: set[int]) -> None:
        for node in sorted(away - self._away):
            self._store.event("left", f"client {node} is gone", node=node)
        self._away |= away

    def _wait(self, grid: Grid, log: RoundLog, need: Callable[[], int], courtesy: float = 0.0) -> list[int]:
        """Wait for clients; even where enough are there, ``courtesy`` seconds for each that has just come."""
        deadline_s = self._deadline_s
        closes = time.monotonic() + deadline_s
        while True:
            self._orders.obey()
            available = self._meet(grid, log)
            self.look(grid)
            if self._orders.stop:
                return available
            now, loading = time.monotonic(), self._loading()
            just_come = any(now - asked < courtesy for asked in loading.values())
            if self._orders.paused:
                closes = now + deadline_s
            elif (len(available) >= need() and not just_come) or (now >= closes and not loading):
                return available
            else:
                told = {"loading": len(loading), "loading_nodes": self._loading_numbers()}
                self._say("waiting for clients", have=len(available), need=need(), **told)
            time.sleep(min(_POLL_S, LONGEST_PAUSE_S) if loading else _POLL_S)

    def _loading(self) -> dict[int, float]:
        """Return the nodes that are waited for because they load, with when each was first asked."""
        oldest = time.monotonic() - _LONGEST_LOADING_S
        return {
            flower: question.first
            for flower, question in self._asked.items()
            if question.first > oldest and self._may_count(flower)
        }

    def _loading_numbers(self) -> list[int]:
        return sorted(self._numbers[flower] for flower in self._loading() if flower in self._numbers)

    def _may_count(self, flower_id: int) -> bool:
        """Whether a node can be a client of this run, as far as its key tells."""
        number = self._numbers.get(flower_id)
        if number is None:
            return self._proven is None
        return number < self._config.clients and number not in self._roster.quarantined

    def _meet(self, grid: Grid, log: RoundLog) -> list[int]:
        """Ask whoever is new, hear whoever has answered; return the numbers of all that are available."""
        online = list(grid.get_node_ids())
        self._asked = {node: question for node, question in self._asked.items() if node in set(online)}
        strangers = [node for node in self._roster.strangers(online) if self._is_due(node)]
        if self._talk is None:
            self._talk = Conversation(grid)
        if strangers and self._proven is not None:
            self._numbers = self._proven()
        for node in strangers:
            self._ask(self._talk, node)
        while self._talk.listen(lambda message, node: self._hear(message, node, online, log)):
            pass
        return self._roster.available(online)

    def _is_due(self, flower_id: int) -> bool:
        now = time.monotonic()
        if flower_id in self._asked:
            return self._asked[flower_id].again <= now
        return flower_id not in self._refused or self._refused[flower_id].again <= now

    def _ask(self, talk: Conversation, flower_id: int) -> None:
        """Let a node introduce itself; an earlier question to it stays open."""
        now, longest = time.monotonic(), self._deadline_s
        asked = self._asked.get(flower_id)
        if asked is None:
            content, pause = self._question(flower_id), longest / _QUESTIONS
            asked = self._asked[flower_id] = _Question(content, now, now + pause, pause)
        else:
            asked.pause = min(2 * asked.pause, longest)
            asked.again = now + asked.pause
        talk.ask(Message(asked.content, flower_id, "train", group_id="describe"))

    def _question(self, flower_id: int) -> RecordDict:
        """Ask a node who it is, and tell it why its last introduction was not taken."""
        refused = self._refused.get(flower_id)
        arguments = {} if refused is None else {wire.REFUSED: refused.reason}
        return wire.pack_instruction(Instruction(self._messages.run, "describe", arguments=arguments))

    def _hear(self, message: Message, flower_id: int, online: list[int], log: RoundLog) -> None:
        """Admit a node by its answer, or note why not."""
        question = self._asked.pop(flower_id, None)
        asked = self._question(flower_id) if question is None else question.content
        if wire.has_gone(message):
            return  # it has gone; if it comes back it is asked again
        known = next((n for n, m in self._roster.members.items() if m.flower_id == flower_id), None)
        if known is not None:  # it was asked twice, and has answered twice
            self._crossed(known, asked, message.content if message.has_content() else None, log)
            return
        number = self._numbers.get(flower_id)
        try:
            reply = _reply_of(message)
            if self._proven is None:
                number = _claimed(reply)
            member = _member(reply, flower_id)
            if self._proven is not None:
                _require_own_number(member.node, number)
            if self._shared is not None:
                require_alike(self._shared, reply.facts, self._config)
            if self._messages.signatures is not None:
                self._messages.signatures.introduce(member.node, reply)
                self._store.certify(member.node, reply.certificate)
            refused = self._roster.admit(member, online)
        except Exception as error:  # of whatever kind: it came of what one node sent
            refused = refusal(error)
        if refused:
            self._refuse(flower_id, refused, number)
            return
        self._refused.pop(flower_id, None)
        self._crossed(member.node, asked, message.content, log)
        self._say("meeting clients", have=len(self._roster.members), need=self._config.clients)
        self._messages.downlink.sent.known.setdefault(member.node, 0)
        facts = {name: told for name, told in reply.facts.items() if name != MODEL}
        if facts.get(TEXTS) != OWN:
            facts.pop(TEXTS, None)
        self._store.node_log(member.node, facts.pop(wire.LOG, ""), round=log.number)
        if facts:
            device = {**reply.metrics, **facts}
            self._store.event("joined", f"client {member.node}", node=member.node, device=device)

    def _crossed(self, node: int, asked: RecordDict, answer: RecordDict | None, log: RoundLog) -> None:
        log.crossed("down", node, "describe", asked, payload=0, dense=None)
        if answer is not None:
            log.crossed("up", node, "describe", answer, payload=0, dense=None)

    def _refuse(self, flower_id: int, reason: str, number: int | None) -> None:
        """Note a node that could not introduce itself, and ask it again later and later."""
        before = self._refused.get(flower_id)
        name = "a node" if number is None else f"node {number}"
        sentence = f"{name} was not admitted: {reason}"
        if before is None or before.sentence != sentence:
            known = {} if number is None else {"node": number}
            self._store.event("refused", sentence, flower_id=str(flower_id), **known)
        pause = 0.0 if before is None else before.pause
        following = min(max(_SECOND_PAUSE_S, 2 * pause), _LONGEST_PAUSE_S)
        self._refused[flower_id] = _Refusal(reason, sentence, time.monotonic() + pause, following)


def _named(numbers: list[int]) -> str:
    shown = ", ".join(f"node {number}" for number in numbers[:5])
    return shown + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _reply_of(message: Message) -> wire.Reply:
    if message.has_error():
        raise WireError(claims.failure(str(message.error.reason)))
    return wire.unpack_reply(message.content)


def _claimed(reply: wire.Reply) -> int | None:
    """Return the number that a node says it has, if it says one; the introduction may be wrong otherwise."""
    number = reply.metrics.get("node", 0.5)
    return int(number) if number.is_integer() else None


def _require_own_number(claimed: int, proven: int | None) -> None:
    """A key stands for one number, the one that it was made for."""
    if proven is None:
        raise WireError(f"it says that it is client {claimed}, and its key is none that may join")
    if claimed != proven:
        raise WireError(
            f"its key is that of node {proven}, and it says that it is client {claimed}; "
            f"bundle.toml on the device must say node = {proven}"
        )


def _member(reply: wire.Reply, flower_id: int) -> Member:
    if reply.error:
        raise WireError(reply.error)
    if "node" not in reply.metrics:
        raise WireError("it does not say which client it is; was it sent by fedllm?")
    node = claims.whole("the client's number", reply.metrics["node"], claims.MOST_NODE)
    held_out = claims.whole("held_out", reply.metrics.get("held_out", 0.0), claims.MOST_EXAMPLES)
    return Member(node, flower_id, reply.examples, held_out)
