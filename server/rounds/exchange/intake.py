"""Where replies come in: each is read, gated and folded, or rejected with its reason. None can end a run."""

from __future__ import annotations

import logging
from dataclasses import replace

from flwr.app import Message

from fedllm.errors import RejectedReply, WireError
from fedllm.protocol import claims, wire
from fedllm.protocol.wire import STALE
from fedllm.runs.provenance.chain import Sent
from fedllm.runs.writer import RunStore
from server.rounds.exchange import staleness
from server.rounds.exchange.messages import Messages, OpenExchange
from server.rounds.roster import Roster
from strategies.base import Method, Reply, State

__all__ = ["Intake", "refusal"]

logger = logging.getLogger(__name__)


class Intake:
    """Takes in the replies of one run.

    Args:
        method: folds what passes.
        messages: reads and gates.
        roster: knows what each client said when it introduced itself.
        store: keeps what nodes log.
    """

    def __init__(self, method: Method, messages: Messages, roster: Roster, store: RunStore) -> None:
        self._method, self._messages, self._roster, self._store = method, messages, roster, store
        self._server = messages.config.server
        self._lost_in: set[tuple[int, int]] = set()

    def take(self, opened: OpenExchange, node: int, message: Message, state: State) -> bool:
        """Read, gate and fold one reply to the open exchange, and note what became of it.

        Returns:
            Whether the client has lost its tensors and must be asked again, with the tensors whole.
        """
        kind = opened.exchange.kind
        opened.answered.add(node)
        if message.has_error():
            reason = f"the client failed: {claims.failure(str(message.error.reason))}"
            opened.log.outcome(node, kind, "failed", reason=reason)
            return False
        try:
            told, reply = self._messages.read(message.content, opened, self._roster.members[node], state)
        except Exception as error:  # of whatever kind: it came of what one client sent
            opened.log.outcome(node, kind, "rejected", reason=refusal(error))
            return False
        self._store.node_log(node, told.facts.get(wire.LOG, ""), round=opened.log.number)
        if told.error == STALE and node not in opened.resent:
            self._messages.downlink.sent.known.pop(node, None)
            opened.resent.add(node)
            opened.answered.discard(node)
            return True
        if reply is None:
            opened.log.outcome(node, kind, "failed", reason=told.error)
            return False
        if opened.acc is not None:
            stale = state.version - opened.begun.get(node, (0, state.version))[1]
            if self._too_stale(opened, node, stale):
                return False
            try:
                opened.acc = self._method.fold(
                    opened.acc, kind, staleness.weighed(self._server, reply, stale)
                )
            except Exception as error:  # a fold raises before it changes anything, or not at all
                opened.log.outcome(node, kind, "rejected", reason=refusal(error))
                return False
            opened.staleness[node] = stale
        self._accept(opened, told, reply)
        return False

    def _too_stale(self, opened: OpenExchange, node: int, stale: int) -> bool:
        """Pass over an answer that began too long ago; its client may be asked again at once."""
        most = self._server.max_staleness
        if most is None or stale <= most:
            return False
        opened.answered.discard(node)
        reason = f"it began {stale} commits ago, server.max_staleness = {most}"
        opened.log.outcome(node, opened.exchange.kind, "late", reason=reason)
        return True

    def _accept(self, opened: OpenExchange, told: wire.Reply, reply: Reply) -> None:
        node, metrics = reply.node, dict(told.metrics)
        if reply.examples < reply.claimed:
            metrics["weight"] = float(reply.examples)
        if opened.staleness.get(node):
            metrics["staleness"] = float(opened.staleness[node])
        if metrics.get("state_lost"):
            self._lost(node, opened.log.number)
        opened.accepted[node] = replace(told, examples=reply.examples)
        digest = wire.digest(told, self._messages.run, node)
        opened.replies.append(Sent(node, digest, opened.exchange.kind, told.signature.hex()))
        measured = opened.exchange.kind == "fit" and opened.secure is None and self._method.gated(node)
        norm = reply.norm if measured else None
        if not self._method.gated(node):
            metrics.pop("update_norm", None)
        if norm is not None:
            opened.norms.append(norm)
            opened.values += sum(int(tensor.count_nonzero()) for tensor in reply.tensors.values())
        opened.log.outcome(
            node, opened.exchange.kind, "accepted", examples=told.examples, metrics=metrics, update_norm=norm
        )

    def _lost(self, node: int, round: int) -> None:
        """Tell once a round of a client that no longer had what it kept of the run."""
        if (node, round) not in self._lost_in:
            self._lost_in.add((node, round))
            sentence = (
                f"client {node} no longer has its state of this run at the round it goes on from, which was "
                "deleted or made room for others (--keep-runs, --state-limit): it starts its part anew"
            )
            self._store.event("lost", sentence, round=round, node=node)


def refusal(error: Exception) -> str:
    """Say why a reply is not taken: for what it holds, or because the server failed over it.

    A fault of the server's, memory that ran out or one of ours, leaves its traceback in the server's log.
    """
    if isinstance(error, WireError | RejectedReply):
        return str(error) or "it gives no reason"
    logger.error("the server failed over a reply, which is rejected for it", exc_info=error)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return claims.text(f"the server failed over it, which is no fault of the client ({what}); see its log")
