"""Simulated time: what an exchange would take on the devices that the clients are said to be.

A device is asked at the start of an exchange, as all of its cohort are. Its answer is there after

    latency + bytes down / bandwidth  +  FLOPs / (peak x efficiency)  +  latency + bytes up / bandwidth

unless it leaves before. Nothing of this depends on the host: bytes are those of the ledger, FLOPs those of
:mod:`server.rounds.timing.work`, and who is there and who leaves is drawn by client, round and attempt. The
server's own work, introductions and what a simulation's processes forget and are sent again take no time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from flwr.app import Message, RecordDict

from fedllm.devices import Named
from fedllm.errors import RunFailed, WireError
from fedllm.protocol import wire
from fedllm.protocol.wire import STALE, Reply
from fedllm.randomness import stream
from fedllm.wording import human_seconds
from server.rounds.exchange.messages import OpenExchange
from server.rounds.round_log import forward_passes

__all__ = ["Clock", "Event", "Timed", "departure"]

WAIT_S = 60.0
"""Between two looks whether a quorum of devices is there."""
_LOOKS = 10_000

Flops = Callable[[int, str, Reply], float]
"""Floating-point operations behind a client's reply to an exchange of some kind."""


class Event(NamedTuple):
    """What a device does: it answers, or it leaves before; seconds since the exchange began."""

    seconds: float
    node: int
    answers: bool


class Clock:
    """Counts the seconds of one round at a time, over all its attempts and exchanges.

    Args:
        devices: of each client, by number.
        flops: counts the work behind a reply.
        seed: of the run.
        deadline_s: seconds after which an exchange closes.

    Attributes:
        now: seconds since the round began, or since the run began where rounds overlap.
    """

    def __init__(self, devices: Sequence[Named], flops: Flops, seed: int, deadline_s: float) -> None:
        self.devices, self.deadline_s = devices, deadline_s
        self._flops, self._seed = flops, seed
        self.now = self._began = 0.0
        self._round = self._attempt = 0
        self._left: dict[int, float] = {}
        """When each device that is there leaves, in seconds of the round."""
        self._computed: dict[tuple[int, int, str], float] = {}
        """When the work of (client, exchange) was done: asked again, a client answers what it has."""

    def begin(
        self,
        round: int,
        attempt: int,
        clients: Iterable[int],
        quorum: int,
        *,
        since: float = 0.0,
        busy: Collection[int] = (),
    ) -> list[int]:
        """Begin an attempt at a round; wait until a quorum of devices is there, and return who is.

        Args:
            round: its number; 0 waits for nobody, since it may ask nobody.
            attempt: from 0, which begins the round's clock anew.
            clients: that could be asked, ascending.
            quorum: of the run.
            since: when the round began, where rounds overlap.
            busy: who is at work since earlier rounds; they count as there, and nobody is waited for then.

        Raises:
            RunFailed: so many devices are practically never there at once.
        """
        if attempt == 0:
            self.now, self._computed, self._began = since, {}, since
        self._round, self._attempt = round, attempt
        everybody = list(clients)
        for look in range(_LOOKS):
            there = [node for node in everybody if self._is_there(node, look) or node in busy]
            if len(there) >= min(quorum, len(everybody)) or round == 0 or busy:
                return there
            self.now += WAIT_S
        raise RunFailed(
            f"round {round}: a quorum of {quorum} devices was not there once in "
            f"{human_seconds(_LOOKS * WAIT_S)} of simulated time; lower server.quorum, or raise the "
            "availability of devices"
        )

    @property
    def seconds(self) -> float:
        """Seconds since the round began."""
        return self.now - self._began

    def stays(self, node: int) -> bool:
        """Whether a device that was looked for when the round began has not left since."""
        return self._left[node] > self.now

    def _is_there(self, node: int, look: int) -> bool:
        """Draw whether a device is there, and if it is, when it leaves."""
        device = self.devices[node].device
        draws = stream(self._seed, "device", node, self._round, self._attempt, look)
        there = bool(draws.random() < device.availability)
        # A session of fixed length, at a point of it that is uniform: so is what is left of it.
        left = float("inf") if device.session_s is None else device.session_s * float(draws.random())
        self._left[node] = self.now + left
        return there

    def heard(self, node: int, opened: OpenExchange, down: int, content: RecordDict | None) -> Event:
        """Say when a device that was asked just now answers so, or leaves; see :meth:`event`."""
        reply: Reply | None = None
        if content is not None:
            try:
                reply = wire.unpack_reply(content)
                made = forward_passes(reply.metrics, kept=node in opened.log.kept)
                reply = replace(reply, metrics={**reply.metrics, "forward": made})
            except WireError:  # it is rejected when its time has come
                reply = None
        up = 0 if content is None else wire.size(content)
        return self.event(node, opened.index, opened.exchange.kind, down, up, reply)

    def event(self, node: int, exchange: int, kind: str, down: int, up: int, reply: Reply | None) -> Event:
        """Say when a device that was asked just now answers, or leaves.

        Args:
            node: the client.
            exchange: its index in the round.
            kind: of the exchange.
            down: bytes of the question.
            up: bytes of the answer.
            reply: the answer; ``None`` where it says nothing of work.
        """
        device = self.devices[node].device
        received = self.now + device.receives(down)
        work = 0.0 if reply is None else device.computes(self._flops(node, kind, reply))
        done, left = received + work, self._left[node]
        if kind != "evaluate":
            done = max(received, self._computed.get((node, exchange, kind), done))
            if done <= left:
                self._computed[node, exchange, kind] = done
        answered = done + device.sends(up)
        return Event(max(min(answered, left) - self.now, 0.0), node, answered <= left)

    def lateness(self, node: int, seconds: float) -> str:
        """Say why a device is late."""
        return (
            f"a {self.devices[node].name} answers after {human_seconds(seconds)} of simulated time, "
            f"server.deadline_s = {self.deadline_s:g}"
        )


def departure(seconds: float) -> str:
    """Say why a device failed that is not there any more."""
    return f"the device left after {human_seconds(seconds)} of simulated time"


class Timed:
    """One exchange on simulated time: all are asked, replies are held, and then counted as they would come.

    Args:
        clock: goes on by what the exchange takes.
        opened: the exchange.
        take: takes in one reply; see :meth:`server.rounds.exchange.intake.Intake.take`.
    """

    def __init__(
        self, clock: Clock, opened: OpenExchange, take: Callable[[int, Message], Message | None]
    ) -> None:
        self._clock, self._opened, self._take = clock, opened, take
        self._down: dict[int, int] = {}
        self._held: dict[int, Message] = {}

    @property
    def missing(self) -> int:
        """Replies that have not come yet."""
        return len(self._opened.nodes) - self.held

    @property
    def held(self) -> int:
        """Replies that have come."""
        return len(self._held)

    @property
    def silent(self) -> list[int]:
        """Clients that have not answered."""
        return [node for node in self._opened.nodes if node not in self._held]

    def asking(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Pass questions on, in the order of the exchange's nodes, and note their size."""
        for node, message in zip(self._opened.nodes, messages, strict=True):
            self._down[node] = wire.size(message.content)
            yield message

    def hold(self, node: int, message: Message) -> Message | None:
        """Keep a reply; may return a message to send again."""
        stale = message.has_content() and wire.failure_of(message.content) == STALE
        if stale and node not in self._opened.resent:
            return self._take(node, message)
        self._held[node] = message
        return None

    def close(self) -> dict[int, str]:
        """Count replies in the order of simulated time until enough came, or the deadline.

        Returns:
            Why each client is late that is, by number.
        """
        clock, opened = self._clock, self._opened
        late: dict[int, str] = {}
        passed = clock.deadline_s if self.silent else 0.0
        for seconds, node, answers in sorted(map(self._event, self._held)):
            if not opened.missing:
                break
            opened.log.simulated[node] = seconds
            if seconds > clock.deadline_s:
                late[node] = clock.lateness(node, seconds)
                passed = clock.deadline_s
                continue
            if answers:
                self._take(node, self._held[node])
            else:
                opened.answered.add(node)
                opened.log.outcome(node, opened.exchange.kind, "failed", reason=departure(seconds))
            passed = max(passed, seconds) if opened.missing else seconds
        clock.now += passed
        return late

    def _event(self, node: int) -> Event:
        message = self._held[node]
        content = message.content if message.has_content() else None
        return self._clock.heard(node, self._opened, self._down[node], content)
