"""Between the server's state and the wire: instructions written, replies read, every byte counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flwr.app import RecordDict

from fedllm.codecs import Codecs
from fedllm.config import RunConfig
from fedllm.errors import RejectedReply, WireError
from fedllm.protocol import wire
from fedllm.protocol.uplink import Uplink, Upload, clip_of
from fedllm.protocol.wire import Instruction
from fedllm.runs.provenance.chain import Sent
from fedllm.secagg.rules import task
from fedllm.tensors import Spec, Tensors, dense_bytes, digest, fingerprint, spec_of
from server.rounds import gates
from server.rounds.exchange.downlink import Downlink
from server.rounds.exchange.secure import Secure
from server.rounds.roster import Member
from server.rounds.round_log import RoundLog
from server.rounds.signatures import Signatures
from server.rounds.state import ServerState
from strategies.base import Exchange, Method, Reply, State

__all__ = ["LEAST_BOUND", "Messages", "OpenExchange"]

LEAST_BOUND = 1 << 20
"""Bytes that any reply may have: an introduction, metrics, lines of a log."""


@dataclass
class OpenExchange:
    """The exchange that is under way.

    Attributes:
        exchange: what is asked.
        index: its place in the round, from 0.
        nodes: the clients asked, by number.
        wanted: accepted replies after which it closes.
        acc: the method's accumulator; ``None`` for an evaluation.
        log: of the round.
        limits: what a reply may count for, and how long its update may be.
        accepted: replies that counted; ``examples`` is what each counted for.
        replies: what the run's chain keeps of those.
        norms: L2 norms of the updates that counted.
        values: that those updates hold besides zeros.
        answered: clients that need not be waited for, whatever they answered.
        resent: clients that had lost their version and were sent the tensors whole.
        estimates: next receiver states of the uplink codec, by client; they count once the round does.
        begun: round in which each client was asked, and version of the global tensors that it began from.
        staleness: commits since each client whose reply counted began; all 0 but in mode ``async``.
        secure: the session of secure aggregation that it is a step of, if any.
    """

    exchange: Exchange
    index: int
    nodes: list[int]
    wanted: int
    acc: Any
    log: RoundLog
    limits: gates.Limits
    accepted: dict[int, wire.Reply] = field(default_factory=dict)
    replies: list[Sent] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    values: int = 0
    answered: set[int] = field(default_factory=set)
    resent: set[int] = field(default_factory=set)
    estimates: dict[int, Tensors] = field(default_factory=dict)
    begun: dict[int, tuple[int, int]] = field(default_factory=dict)
    staleness: dict[int, int] = field(default_factory=dict)
    secure: Secure | None = None

    @property
    def missing(self) -> int:
        """Accepted replies that it still needs; at 0 it may close."""
        return max(self.wanted - len(self.accepted), 0)


class Messages:
    """Writes and reads the messages of one run.

    Attributes:
        run: identity of the run, as clients file their state under.
        downlink: brings nodes to the current version.
        signatures: of replies, where nodes have keys.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        codecs: Codecs,
        run: str,
        state: ServerState,
        signatures: Signatures | None = None,
    ) -> None:
        self.config, self.method, self.run = config, method, run
        self.signatures = signatures
        self.downlink = Downlink(config, codecs.down, method, state.sent)
        self._uplink = Uplink(config, codecs.up)
        self._estimates = state.estimates
        self._digests: dict[int, int] = {}
        self._digests_of = -1

    def write(self, node: int, opened: OpenExchange, state: State, counted: tuple[int, int]) -> RecordDict:
        """Write one client's instruction; ``counted`` is (round, index) of its newest reply that counted."""
        opened.begun[node] = (opened.log.number, state.version)
        start, sizes, payload = wire.DENSE, tuple[int, ...](), b""
        if opened.exchange.kind not in wire.SESSION:
            start, sizes, payload = self.downlink.payload(node, state.version, state.tensors)
        instruction = Instruction(
            run=self.run,
            kind=opened.exchange.kind,
            round=opened.log.number,
            index=opened.index,
            attempt=opened.log.attempt,
            base=state.version,
            start=start,
            sizes=sizes,
            oldest=self.downlink.sent.first,
            digest=self._digest(node, state),
            counted=counted,
            progress=self._progress(opened.log.number),
            arguments=opened.exchange.arguments,
            payload=payload,
            session=opened.secure.letter(opened.exchange.kind, node) if opened.secure else b"",
        )
        content = wire.pack_instruction(instruction)
        # What is not sent, such as the first version, which all derive for themselves, costs nothing dense.
        dense = dense_bytes(spec_of(self.method.view(state.tensors, node))) if payload else None
        opened.log.crossed("down", node, instruction.kind, content, payload=len(payload), dense=dense)
        return content

    def read(
        self, content: RecordDict, opened: OpenExchange, member: Member, state: State
    ) -> tuple[wire.Reply, Reply | None]:
        """Read one client's reply; the second half is missing where the client says it could not do the work.

        Args:
            content: what the client sent.
            opened: the exchange that it answers.
            member: the client, as it introduced itself.
            state: the server's state; the client worked from it, or from one that was before it.

        Raises:
            WireError: the bytes are not a reply to this exchange.
            RejectedReply: a gate was failed.
        """
        kind, node = opened.exchange.kind, member.node
        begun, version = opened.begun.get(node, (opened.log.number, state.version))
        at = (begun, opened.index)
        upload = Upload(kind, *at, node, self._progress(begun), clip_of(opened.exchange.arguments))
        reply = wire.unpack_reply(content)
        view = self.method.view(state.tensors, node)
        dense = dense_bytes(self.method.stands_for(view)) if upload.coded and reply.payload else None
        opened.log.crossed("up", node, kind, content, payload=len(reply.payload), dense=dense)
        if reply.error:
            return reply, None
        if self.signatures is not None:
            self.signatures.check(node, kind, reply)
        if opened.secure is not None:
            return reply, self._secured(opened.secure, reply, opened, member, view, at)
        expected: Spec = {} if kind == "evaluate" else self.method.expected(opened.exchange, view, node)
        if (reply.round, reply.index) != at:
            raise WireError(f"answers exchange {(reply.round, reply.index)}, asked was {at}")
        # A client that lost its state begins a new estimate, and so does the server.
        estimate = {} if "state_lost" in reply.metrics else self._estimates.get(node, {})
        received = self._uplink.receive(upload, reply.payload, expected, estimate)
        opened.log.codec_up.update(received.parts)
        if received.estimate:
            opened.estimates[node] = received.estimate
        # Statistics of a setup have bounds of their own, which their method knows.
        gated = upload.coded and self.method.gated(node)
        bounds = opened.limits if gated else gates.Limits(opened.limits.examples)
        norm = gates.check(received.tensors, expected, bounds)
        tensors = self._uplink.clip(upload, received.tensors, norm)
        _require_introduced(reply, member.held_out if kind == "evaluate" else member.examples)
        self.downlink.sent.known[node] = version
        weight = min(reply.examples, bounds.examples)
        return reply, Reply(node, tensors, weight, reply.metrics, reply.examples, norm)

    def _secured(
        self,
        secure: Secure,
        reply: wire.Reply,
        opened: OpenExchange,
        member: Member,
        view: Tensors,
        at: tuple[int, int],
    ) -> Reply:
        """Take in what a client says in a session of secure aggregation; its update cannot be read."""
        kind, node = opened.exchange.kind, member.node
        if (reply.round, reply.index) != at:
            raise WireError(f"answers exchange {(reply.round, reply.index)}, asked was {at}")
        if kind in wire.SESSION:
            secure.take(kind, node, reply.payload)
            return Reply(node, {}, 0, {})
        _require_introduced(reply, member.examples)
        weight = min(reply.examples, opened.limits.examples)
        values = sum(item.numel for item in self.method.expected(opened.exchange, view, node).values())
        secure.take_masked(node, reply.payload, values, weight, reply.facts.get(wire.TASK, ""))
        self.downlink.sent.known[node] = opened.begun[node][1]
        return Reply(node, {}, weight, reply.metrics, reply.examples)

    def task(self, opened: OpenExchange, state: State) -> Callable[[int, int], bytes]:
        """Return what digests the task of an exchange under secure aggregation, the same for all clients."""
        exchange, progress = opened.exchange, self._progress(opened.log.number)
        told = (
            self.config.to_json(),
            exchange.kind,
            exchange.arguments,
            progress,
            fingerprint(state.tensors),
        )
        return partial(task, *told)

    def most(self, opened: OpenExchange, state: State) -> int:
        """Return the bytes that no reply to an exchange needs more of.

        A codec may pad and add tables, which for the smallest tensors can be more than the tensors; none
        makes four times as much of what is worth a bound.
        """
        views = {node: self.method.view(state.tensors, node) for node in opened.nodes}
        specs = (self.method.expected(opened.exchange, view, node) for node, view in views.items())
        evaluates = opened.exchange.kind == "evaluate"
        return LEAST_BOUND + 4 * (0 if evaluates else max(map(dense_bytes, specs), default=0))

    def _progress(self, round: int) -> float:
        return max(round - 1, 0) / self.config.rounds

    def _digest(self, node: int, state: State) -> int:
        """Digest of what a client must hold; computed once per version where all hold the same."""
        if self._digests_of != state.version:
            self._digests, self._digests_of = {}, state.version
        view = self.method.view(state.tensors, node)
        key = -1 if view is state.tensors else node
        if key not in self._digests:
            self._digests[key] = digest(view)
        return self._digests[key]


def _require_introduced(reply: wire.Reply, held: int) -> None:
    if not 0 < reply.examples <= held:
        raise RejectedReply(f"claims {reply.examples} examples, but introduced itself with {held}")
