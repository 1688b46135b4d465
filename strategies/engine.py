"""The one Flower strategy: rounds of exchanges over a method, a codec, a server optimiser and a store.

Flower's own strategies hold one exchange a round and keep every reply; this one has its own push and pull
loop, folds replies as they arrive, closes an exchange at its quorum or deadline, and records whatever did not
count with its reason. It is final: a new method is a new file beside it, not a subclass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm import checkpoint, wire
from fedllm.checkpoint import Checkpoint
from fedllm.config import RunConfig
from fedllm.errors import RejectedReply, RunFailed, WireError
from fedllm.resources import peak_rss_bytes
from fedllm.store import RunStore
from fedllm.tensors import Tensors, fingerprint
from fedllm.wire import STALE
from strategies import optimizers
from strategies.admission import Admission
from strategies.base import Exchange, Method, State
from strategies.courier import Courier, OpenExchange
from strategies.exchange import converse
from strategies.roster import Roster, sample
from strategies.round_log import RoundLog

__all__ = ["Engine"]

_REPORT = "report/"


@final
class Engine(Strategy):
    """Runs a federation from its first message to its last commit.

    Args:
        config: the run.
        method: both halves of the federated method.
        store: where rounds, events and checkpoints go.
        initial: global tensors of version 0.
        run: identity of the run; clients file their state under it.
        reference_bytes: of the whole model in fp32, for the reference that every report counts against.
        evaluate: scores global tensors on the server's test set; unset means there is none.
        networked: whether messages cross a network, so that it can be told how long they took.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        store: RunStore,
        *,
        initial: Tensors,
        run: str,
        reference_bytes: int,
        evaluate: Callable[[Tensors], dict[str, float]] | None,
        networked: bool,
    ) -> None:
        self.config, self.method, self.store = config, method, store
        self.state = State(0, initial)
        self.completed = -1
        """Rounds committed; -1 before the setup."""
        self._reference_bytes = reference_bytes
        self._evaluate = evaluate
        self._roster = Roster()
        self._courier = Courier(config, method, run)
        self._counted: dict[int, tuple[int, int]] = {}
        self._open: OpenExchange | None = None
        self._networked = networked
        self._next_log = RoundLog(0, networked=networked)
        self._spoke = 0.0
        self._admission = Admission(config, self._roster, self._courier, store, self._say)

    # --- a run ------------------------------------------------------------------------------------------

    def start(self, grid: Grid, *_: Any, **__: Any) -> Result:
        """Run all rounds that are left; returns early, resumable, when the operator asked to stop.

        Raises:
            RunFailed: too few clients, or a round missed its quorum too often.
        """
        self._admission.gather(grid, self._next_log)
        while self.completed < self.config.rounds and self._may_go_on():
            self._round(grid, self.completed + 1)
        return Result()

    @property
    def finished(self) -> bool:
        """Whether the last round was committed."""
        return self.completed >= self.config.rounds

    def summary(self) -> None:
        """Say in the run's log what this engine is composed of."""
        config = self.config
        self.store.event(
            "start",
            f"{config.method} on {config.model.name}: {config.rounds} rounds, "
            f"{config.cohort} of {config.clients} clients a round, "
            f"up {config.codec.up}, down {config.codec.down}, server {config.server.optimizer}",
        )

    def restore(self, saved: Checkpoint) -> None:
        """Go back to the end of the round that a checkpoint holds."""
        facts, groups = saved.facts, saved.groups
        self.completed = saved.number
        self._next_log = RoundLog(saved.number + 1, networked=self._networked)
        self.state = State(facts["version"], groups["tensors"], groups["memory"])
        increments = groups["increments"]
        self._courier.downlink.first = facts["first"]
        self._courier.downlink.increments = [increments[key].numpy().tobytes() for key in sorted(increments)]
        self._courier.downlink.known = {int(node): version for node, version in facts["known"].items()}
        for key, value in groups["estimates"].items():
            node, _, name = key.partition("/")
            self._courier.estimates.setdefault(int(node), {})[name] = value
        self._counted = {int(node): (at[0], at[1]) for node, at in facts["counted"].items()}
        self._roster.quarantined = set(facts["quarantined"])

    def _checkpoint(self) -> None:
        increments = {
            f"{number:06d}": torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for number, data in enumerate(self._courier.downlink.increments)
        }
        checkpoint.save(
            self.store.folder / "checkpoints",
            self.completed,
            {
                "tensors": self.state.tensors,
                "memory": self.state.memory,
                "increments": increments,
                "estimates": {
                    f"{node}/{name}": value
                    for node, estimate in self._courier.estimates.items()
                    for name, value in estimate.items()
                },
            },
            {
                "version": self.state.version,
                "first": self._courier.downlink.first,
                "known": self._courier.downlink.known,
                "counted": self._counted,
                "quarantined": sorted(self._roster.quarantined),
            },
        )

    def _may_go_on(self) -> bool:
        """Obey what the operator asked for since the last round; waits while paused."""
        paused = False
        while True:
            for command in self.store.take_commands():
                node = command.arguments.get("node")
                if command.kind == "stop":
                    return False
                elif command.kind in ("pause", "resume"):
                    paused = command.kind == "pause"
                    self.store.phase("paused" if paused else "resumed")
                elif command.kind == "quarantine" and isinstance(node, int):
                    self._roster.quarantined.add(node)
                elif command.kind == "release" and isinstance(node, int):
                    self._roster.quarantined.discard(node)
                self.store.event(command.kind, f"{command.by} asked for {command.kind}", **command.arguments)
            if not paused:
                return True
            time.sleep(0.2)

    # --- one round --------------------------------------------------------------------------------------

    def _round(self, grid: Grid, number: int) -> None:
        """Run a round to its commit, with a new attempt whenever the quorum is missed."""
        log = self._next_log
        log.begin()
        for attempt in range(self.config.server.retries + 1):
            log.attempt = attempt
            available = self._admission.quorum(grid, log)
            acc, accepted = self._gather(grid, number, log, available)
            if accepted is not None:
                break
            self.store.event(
                "quorum", f"round {number} missed its quorum of {self.config.quorum}", round=number
            )
        else:
            self.store.abandon(log.nodes, log.entries)
            raise RunFailed(
                f"round {number} missed its quorum of {self.config.quorum} "
                f"in {self.config.server.retries + 1} attempts: {log.last_reason}"
            )
        details: dict[str, Any] = {"accepted": sorted(accepted)}
        if accepted:
            self._commit(acc)
            details.update(_averages(accepted))
            # What a method writes under "report/" is for people.
            reported = {k: v for k, v in self.state.memory.items() if k.startswith(_REPORT)}
            details.update({k.removeprefix(_REPORT): float(v) for k, v in reported.items()})
            downlink = self._courier.downlink
            details["codec"] = {"up": dict(log.codec_up), "down": dict(downlink.parts)}
            if downlink.error is not None:
                details["error_down"] = downlink.error
        self.completed = number
        metrics = self._score(number)
        if number == 0 and not accepted:
            details, metrics = {"initial": metrics}, {}
        if self.config.evaluation.clients and number > 0:
            details["clients"] = self._evaluate_clients(grid, number, log, sorted(accepted))
        record = log.record(
            metrics=metrics,
            reference_bytes=2 * self._reference_bytes * len(accepted) if number > 0 else 0,
            state_sha256=fingerprint(self.state.tensors),
            details=details,
            rss=peak_rss_bytes(),
        )
        self.store.round(record, log.nodes, log.entries)
        self._checkpoint()
        self._next_log = RoundLog(number + 1, networked=self._networked)

    def _gather(
        self, grid: Grid, number: int, log: RoundLog, available: list[int]
    ) -> tuple[Any, dict[int, wire.Reply] | None]:
        """Hold the exchanges that the method asks for; no replies in the end means the quorum was missed."""
        config = self.config
        acc = self.method.begin(self.state, number)
        counted, taking_part = dict(self._counted), dict[int, wire.Reply]()
        estimates: dict[int, Tensors] = {}
        cohort = sample(available, config.cohort + config.server.over_select, config.seed, number)
        nodes, wanted = (available, len(available)) if number == 0 else (cohort, config.cohort)
        index = 0
        while isinstance(plan := self.method.plan(self.state, acc), Exchange):
            self._open = OpenExchange(plan, index, nodes, wanted, acc, log)
            self._hold(grid, number)
            acc, accepted = self._open.acc, self._open.accepted
            if len(accepted) < min(config.quorum, wanted) or not accepted:
                self._counted = counted
                return acc, None
            taking_part |= accepted
            estimates |= {node: self._open.estimates.get(node, {}) for node in accepted}
            self._counted |= dict.fromkeys(accepted, (number, index))
            nodes, wanted, index = sorted(accepted), len(accepted), index + 1
        self._courier.estimates |= {node: estimate for node, estimate in estimates.items() if estimate}
        return acc, taking_part

    def _hold(self, grid: Grid, number: int) -> None:
        """Hold the open exchange: ask, fold, and say who stayed silent."""
        opened = self._opened
        kind = opened.exchange.kind
        told: dict[str, Any] = {"round": number, "need": opened.wanted, "rounds": self.config.rounds}
        told["closes_at"] = time.time() + self.config.server.deadline_s
        self._say(kind, have=0, urgent=True, **told)

        def receive(message: Message, flower_id: int) -> Message | None:
            again = self._take(self._roster.number_of(flower_id), message)
            self._say(kind, have=len(opened.accepted), **told)
            return again

        converse(
            grid,
            self.configure_train(number, ArrayRecord(), None, grid),
            receive=receive,
            enough=lambda: opened.enough,
            deadline_s=self.config.server.deadline_s,
        )
        for node in opened.nodes:
            if node not in opened.answered:
                reason = (
                    "not needed: enough replies came first"
                    if opened.enough
                    else "no reply before the deadline"
                )
                opened.log.outcome(node, kind, "unused" if opened.enough else "late", reason=reason)

    def _commit(self, acc: Any) -> None:
        """Let the method step, then the server optimiser, then the downlink codec."""
        state = self.state
        proposal, memory = self.method.step(state, acc)
        if isinstance(proposal, dict):
            proposal, memory = optimizers.advance(self.config.server, state.tensors, proposal, memory)
        tensors, memory = self._courier.downlink.commit(state.version, state.tensors, proposal, memory)
        self.state = State(state.version + 1, tensors, memory)

    def _score(self, number: int) -> dict[str, float]:
        every = self.config.evaluation.every
        if self._evaluate is None or not every or (number % every and number != self.config.rounds):
            return {}
        self._say("evaluate", round=number, rounds=self.config.rounds, urgent=True)
        return self._evaluate(self.state.tensors)

    def _evaluate_clients(self, grid: Grid, number: int, log: RoundLog, nodes: list[int]) -> dict[str, float]:
        """Average what clients measure on their own held-out texts, weighted by how many they have."""
        self._open = OpenExchange(Exchange("evaluate"), 0, nodes, len(nodes), None, log)
        self._hold(grid, number)
        return _averages(self._opened.accepted)

    # --- Flower's four hooks: one exchange, asked and folded ----------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: Any, grid: Grid
    ) -> Iterable[Message]:
        """Yield the open exchange's messages; what they carry is the engine's own state, not ``arrays``."""
        return (self._message(node) for node in self._opened.nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Gate and fold replies to the open exchange; the commit is made elsewhere, hence no arrays."""
        for message in replies:
            self._take(self._roster.number_of(message.metadata.src_node_id), message)
        return None, MetricRecord({**_averages(self._opened.accepted)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: Any, grid: Grid
    ) -> Iterable[Message]:
        """Ask as in training: the open exchange says that it is an evaluation."""
        return self.configure_train(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Fold as in training."""
        return self.aggregate_train(server_round, replies)[1]

    # --- one message ------------------------------------------------------------------------------------

    @property
    def _opened(self) -> OpenExchange:
        if self._open is None:
            raise RuntimeError("no exchange is open: start() opens them")
        return self._open

    def _message(self, node: int) -> Message:
        opened = self._opened
        content = self._courier.write(node, opened, self.state, self._counted.get(node, (0, 0)))
        flower_id = self._roster.members[node].flower_id
        return Message(
            content, flower_id, "train", ttl=self.config.server.deadline_s, group_id=str(opened.log.number)
        )

    def _take(self, node: int, message: Message) -> Message | None:
        """Read, gate and fold one reply, and note what became of it; may return a message to send again."""
        opened, kind = self._opened, self._opened.exchange.kind
        opened.answered.add(node)
        if message.has_error():
            opened.log.outcome(node, kind, "failed", reason=f"the client failed: {message.error.reason}")
            return None
        try:
            told, reply = self._courier.read(
                node, message.content, opened, self.state, self._roster.members[node].examples
            )
            self.store.node_log(node, told.facts.get(wire.LOG, ""), round=opened.log.number)
            if told.error == STALE and node not in opened.resent:
                self._courier.downlink.known.pop(node, None)
                opened.resent.add(node)
                opened.answered.discard(node)
                return self._message(node)
            if reply is None:
                opened.log.outcome(node, kind, "failed", reason=told.error)
                return None
            if opened.acc is not None:
                opened.acc = self.method.fold(opened.acc, kind, reply)
        except (WireError, RejectedReply) as error:
            opened.log.outcome(node, kind, "rejected", reason=str(error))
            return None
        opened.accepted[node] = told
        opened.log.outcome(node, kind, "accepted", examples=told.examples, metrics=told.metrics)
        return None

    def _say(self, phase: str, *, urgent: bool = False, **facts: Any) -> None:
        """Tell followers what is going on, at most ten times a second."""
        now = time.monotonic()
        if urgent or now - self._spoke > 0.1:
            self._spoke = now
            self.store.phase(phase, **facts)


def _averages(replies: dict[int, wire.Reply]) -> dict[str, float]:
    """Average every metric that all replies carry, weighted by examples."""
    names = set.intersection(*(set(reply.metrics) for reply in replies.values())) if replies else set()
    weight = sum(reply.examples for reply in replies.values())
    return {
        name: sum(reply.metrics[name] * reply.examples for reply in replies.values()) / weight
        for name in sorted(names - {"peak_rss_bytes"})
    }
