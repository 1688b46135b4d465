"""Between the server's state and the wire: instructions written, replies read, every byte counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flwr.app import RecordDict

from fedllm import wire
from fedllm.codecs import parse
from fedllm.codecs.base import CodecContext
from fedllm.config import RunConfig
from fedllm.errors import RejectedReply, WireError
from fedllm.tensors import Spec, Tensors, dense_bytes, digest, spec_of, unpack
from fedllm.wire import Instruction
from strategies import gates
from strategies.base import Exchange, Method, Reply, State
from strategies.downlink import Downlink
from strategies.round_log import RoundLog

__all__ = ["Courier", "OpenExchange"]


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
        accepted: replies that counted.
        answered: clients that need not be waited for, whatever they answered.
        resent: clients that had lost their version and were sent the tensors whole.
        estimates: next receiver states of the uplink codec, by client; they count once the round does.
    """

    exchange: Exchange
    index: int
    nodes: list[int]
    wanted: int
    acc: Any
    log: RoundLog
    accepted: dict[int, wire.Reply] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    resent: set[int] = field(default_factory=set)
    estimates: dict[int, Tensors] = field(default_factory=dict)

    @property
    def enough(self) -> bool:
        """Whether it may close."""
        return len(self.accepted) >= self.wanted


class Courier:
    """Writes and reads the messages of one run.

    Attributes:
        run: identity of the run, as clients file their state under.
        downlink: what each node is known to hold.
        estimates: receiver state of the uplink codec by client (EF21's); empty for most codecs.
    """

    def __init__(self, config: RunConfig, method: Method, run: str) -> None:
        self.config, self.method, self.run = config, method, run
        self.downlink = Downlink(config, method)
        self.estimates: dict[int, Tensors] = {}
        self._digests: dict[int, int] = {}
        self._digests_of = -1

    def write(self, node: int, opened: OpenExchange, state: State, counted: tuple[int, int]) -> RecordDict:
        """Write one client's instruction; ``counted`` is (round, index) of its newest reply that counted."""
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
            oldest=self.downlink.first,
            digest=self._digest(node, state),
            counted=counted,
            progress=self._progress(opened),
            arguments=opened.exchange.arguments,
            payload=payload,
        )
        content = wire.pack_instruction(instruction)
        # Without a codec every exchange but a round's later ones would carry the tensors whole.
        carries = opened.index == 0 or bool(payload)
        dense = dense_bytes(spec_of(self.method.view(state.tensors, node))) if carries else None
        opened.log.crossed("down", node, instruction.kind, content, payload=len(payload), dense=dense)
        return content

    def read(
        self, node: int, content: RecordDict, opened: OpenExchange, state: State, held: int
    ) -> tuple[wire.Reply, Reply | None]:
        """Read one client's reply; the second half is missing where the client says it could not do the work.

        Args:
            node: the client's number.
            content: what it sent.
            opened: the exchange that it answers.
            state: the server's state, from which the client worked.
            held: texts the client said it holds when it introduced itself.

        Raises:
            WireError: the bytes are not a reply to this exchange.
            RejectedReply: a gate was failed.
        """
        kind = opened.exchange.kind
        reply = wire.unpack_reply(content)
        view = self.method.view(state.tensors, node)
        dense = dense_bytes(spec_of(view)) if kind == "fit" and reply.payload else None
        opened.log.crossed("up", node, kind, content, payload=len(reply.payload), dense=dense)
        if reply.error:
            return reply, None
        expected: Spec = {} if kind == "evaluate" else self.method.spec(opened.exchange, view)
        at = (opened.log.number, opened.index)
        if (reply.round, reply.index) != at:
            raise WireError(f"answers exchange {(reply.round, reply.index)}, asked was {at}")
        if kind == "fit":
            context = CodecContext(self.config.seed, ("up", *at, node), self._progress(opened))
            # A client that lost its state begins a new estimate, and so does the server.
            estimate = {} if "state_lost" in reply.metrics else self.estimates.get(node, {})
            codec = parse(self.config.codec.up)
            tensors, after, parts = codec.inspect(reply.payload, expected, estimate, context)
            opened.log.codec_up.update(parts)
            if after:
                opened.estimates[node] = after
        else:
            tensors = unpack(reply.payload, expected)
        gates.check(tensors, expected, max_norm=self.config.server.max_update_norm)
        if reply.examples <= 0 or (kind != "evaluate" and reply.examples > held):
            raise RejectedReply(f"claims {reply.examples} examples, but introduced itself with {held}")
        self.downlink.known[node] = state.version
        return reply, Reply(node, tensors, reply.examples, reply.metrics)

    def _progress(self, opened: OpenExchange) -> float:
        return max(opened.log.number - 1, 0) / self.config.rounds

    def _digest(self, node: int, state: State) -> int:
        """Digest of what a client must hold; computed once per version where all hold the same."""
        if self._digests_of != state.version:
            self._digests, self._digests_of = {}, state.version
        view = self.method.view(state.tensors, node)
        key = -1 if view is state.tensors else node
        if key not in self._digests:
            self._digests[key] = digest(view)
        return self._digests[key]
