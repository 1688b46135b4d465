"""The one Flower strategy: rounds of exchanges over a method, a codec, a server optimiser and a store.

Flower's own strategies hold one exchange a round and keep every reply; this one has its own push and pull
loop, folds replies as they arrive, closes an exchange at its quorum or deadline, and records whatever did not
count with its reason. It is final: a new method is a new file beside it, not a subclass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, final

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm import tasks
from fedllm.codecs import Codecs
from fedllm.config import RunConfig
from fedllm.errors import RunFailed
from fedllm.host.resources import peak_rss_bytes
from fedllm.protocol import wire
from fedllm.protocol.uplink import CLIP
from fedllm.runs.summary import SIMULATED
from fedllm.runs.writer import RunStore
from fedllm.tasks.metrics import by_class, neglect
from fedllm.tensors import Tensors, fingerprint
from server.rounds import gates
from server.rounds.admission import Admission, Proven
from server.rounds.commit import Committer
from server.rounds.exchange import staleness
from server.rounds.exchange.bounds import Bounds
from server.rounds.exchange.conversation import converse
from server.rounds.exchange.intake import Intake
from server.rounds.exchange.messages import LEAST_BOUND, Messages, OpenExchange
from server.rounds.exchange.secure import Secure
from server.rounds.exchange.told import averages, most_spent, spreads
from server.rounds.orders import Orders
from server.rounds.privacy import Privacy, Spent
from server.rounds.roster import Roster, sample
from server.rounds.round_log import RoundLog
from server.rounds.signatures import Signatures
from server.rounds.state import ServerState
from server.rounds.timing.buffered import Buffered
from server.rounds.timing.clock import Clock, Timed
from strategies.base import Exchange, Method

__all__ = ["Engine"]


@final
class Engine(Strategy):
    """Runs a federation from its first message to its last commit.

    Args:
        config: the run.
        method: both halves of the federated method.
        codecs: of the run's messages.
        store: where rounds, events and checkpoints go.
        state: of a new run, or of one that goes on; changed in place.
        run: identity of the run; clients file their state under it.
        reference_bytes: of the whole model in fp32, for the reference that every report counts against.
        evaluate: scores global tensors on the server's test set; unset means there is none.
        networked: whether messages cross a network, so that it can be told how long they took.
        proven: which client each node's key stands for; None where nodes have no keys.
        bound: told how many bytes replies have at most, before they are asked for; None where nobody checks.
        privacy: of a differentially private run: noise, cohorts and what is spent.
        clock: of simulated devices, by which clients are there, late or gone; None goes by the host's own.
        signatures: checks whose each reply is; None where nodes have no certificates, as in a simulation.
        shared: what each client has to have in common with the server; None compares nothing.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        codecs: Codecs,
        store: RunStore,
        *,
        state: ServerState,
        run: str,
        reference_bytes: int,
        evaluate: Callable[[Tensors], dict[str, float]] | None,
        networked: bool,
        proven: Proven | None = None,
        bound: Callable[[int], None] | None = None,
        privacy: Privacy | None = None,
        clock: Clock | None = None,
        signatures: Signatures | None = None,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.method, self.codecs, self.store = config, method, codecs, store
        self.state = state
        self._reference_bytes = reference_bytes
        self._evaluate = evaluate
        self._roster = Roster(config.clients, quarantined=state.quarantined, declared=state.declared)
        self._messages = Messages(config, method, codecs, run, state, signatures)
        self._intake = Intake(method, self._messages, self._roster, store)
        self._open: OpenExchange | None = None
        self._bounds = Bounds(config, method, codecs, self._roster, state, store)
        self._bound, self._most = bound, 0
        self._privacy, self.spent = privacy, ""
        self._committer = Committer(config, method, self._messages.downlink, state, privacy)
        self._networked, self._clock = networked, clock
        # A short deadline on simulated devices is none for the host that computes in their place.
        self._patience_s = config.server.deadline_s if clock is None else max(config.server.deadline_s, 600.0)
        self._next_log = RoundLog(state.completed + 1, networked=networked)
        self._spoke = 0.0
        self._orders = Orders(store, self._roster)
        self._admission = Admission(
            config, self._roster, self._messages, self._orders, store, self._say,
            proven=proven, shared=shared, deadline_s=self._patience_s,
        )  # fmt: skip
        self._buffered = Buffered(
            config, state, self._roster, store, clock, self._patience_s,
            message=self._message, take=self._take, look=self._admission.look, say=self._say,
        )  # fmt: skip

    # --- a run ------------------------------------------------------------------------------------------

    def start(self, grid: Grid, *_: Any, **__: Any) -> Result:
        """Run all rounds that are left; returns early, resumable, when the operator asked to stop.

        Raises:
            RunFailed: too few clients, or a round missed its quorum too often.
        """
        self._allow(LEAST_BOUND)
        self._admission.gather(grid, self._next_log)
        while not self.finished and self._may_go_on():
            try:
                self._round(grid, self.completed + 1)
            except Spent as error:
                self.spent = f"the budget of privacy is spent: {error}"
                self.store.event("spent", self.spent, round=self.completed)
                self.store.abandon(self._next_log.nodes, self._next_log.entries)
        return Result()

    @property
    def completed(self) -> int:
        """Rounds committed; -1 before the setup."""
        return self.state.completed

    @property
    def finished(self) -> bool:
        """Whether the last round was committed, evaluations found nothing better, or the budget is spent."""
        patience = self.config.evaluation.patience
        return self.completed >= self.config.rounds or 0 < patience <= self.store.tries or bool(self.spent)

    def summary(self) -> None:
        """Say in the run's log what this engine is composed of."""
        config = self.config
        self.store.event(
            "start",
            f"{config.method} on {config.model.name}: {config.rounds} rounds, "
            f"{config.answers} of {config.clients} clients a round, "
            f"up {config.codec.up}, down {config.codec.down}, server {config.server.optimizer}",
        )

    def _may_go_on(self) -> bool:
        """Obey what the operator asked for since the last round; waits while paused."""
        while True:
            self._orders.obey()
            if self._orders.stop or not self._orders.paused:
                return not self._orders.stop
            time.sleep(0.2)

    # --- one round --------------------------------------------------------------------------------------

    def _round(self, grid: Grid, number: int) -> None:
        """Run a round to its commit, with a new attempt whenever the quorum is missed.

        Asked to stop while clients are waited for, it leaves the round uncommitted.
        """
        log = self._next_log
        log.begin()
        if self._privacy is not None and number > 0:
            self._privacy.begin(number)
        for attempt in range(self.config.server.retries + 1):
            log.attempt = attempt
            available = self._admission.quorum(grid, log)
            if self._orders.stop:
                self.store.abandon(log.nodes, log.entries)
                return
            if self._clock is not None:
                since, busy = self.state.now, self.state.flights
                available = self._clock.begin(
                    number, attempt, available, self.config.quorum, since=since, busy=busy
                )
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
        # Clients name their metrics themselves: what the server knows comes after them.
        # Noise does not hide what they tell of themselves.
        told = {} if self._privacy else averages(accepted)
        details: dict[str, Any] = {**told, "accepted": sorted(accepted)}
        if self.config.buffered and accepted:
            details |= staleness.spread(self._opened.staleness.values())
        if accepted or (self._privacy is not None and number > 0):
            details |= self._committer.commit(number, acc, accepted)
            details["codec"] = {"up": dict(log.codec_up), "down": dict(self._messages.downlink.parts)}
        self.state.completed = number
        metrics, classes = by_class(self._score(number))
        if self.config.evaluation.clients and number > 0:
            scores = self._evaluate_clients(grid, number, log, sorted(accepted))
            alone = tasks.of(self.config).alone
            details |= {"clients": averages(scores, alone), "spread": spreads(scores, self.config.metric)}
        if classes:
            details["classes"] = classes
        if self._clock is not None:
            details[SIMULATED] = self._clock.seconds
            self.state.now = self._clock.now if self.config.buffered else 0.0
        record = log.record(
            metrics=metrics,
            reference_bytes=_crossings(number) * self._reference_bytes * len(accepted),
            state_sha256=fingerprint(self.state.current.tensors),
            details=details,
            rss=peak_rss_bytes(),
        )
        if self._privacy is not None:
            record = replace(record, epsilon=self._privacy.epsilon, delta=self._privacy.delta)
        elif self.config.privacy.hides:
            self.state.spent = most_spent(self.state.spent, accepted.values())
            record = replace(record, epsilon=self.state.spent[0], delta=self.state.spent[1])
        self.store.round(record, log.nodes, log.entries, log.replies)
        if self.finished and (missed := neglect(metrics, classes)):
            self.store.event("warning", missed, round=number)
        kept = self.config.checkpoints
        best = {reached: found.round for reached, found in self.store.bests.items()}
        self.state.save(self.store.folder / "checkpoints", keep=kept.last, every=kept.every, best=best)
        self._next_log = RoundLog(number + 1, networked=self._networked)

    def _gather(
        self, grid: Grid, number: int, log: RoundLog, available: list[int]
    ) -> tuple[Any, dict[int, wire.Reply] | None]:
        """Hold the exchanges that the method asks for; no replies in the end means the quorum was missed."""
        config = self.config
        acc = self.method.begin(self.state.current, number)
        counted, taking_part = dict(self.state.counted), dict[int, wire.Reply]()
        estimates: dict[int, Tensors] = {}
        norms: list[float] = []
        values = 0
        log.replies.clear()
        log.lack = ""
        cohort = sample(available, config.cohort + config.server.over_select, config.seed, number)
        nodes, wanted = (available, len(available)) if number == 0 else (cohort, config.cohort)
        if self._privacy is not None and number > 0 and not config.privacy.secure_aggregation:
            nodes = self._privacy.cohort(number, available)
            wanted = len(nodes)
            if not nodes:  # so the coins fell: a round of noise alone
                return acc, {}
        buffered, index = config.buffered and number > 0, 0
        if buffered:
            nodes, wanted = available, config.answers
        while isinstance(plan := self.method.plan(self.state.current, acc), Exchange):
            log.kept = set(self.state.counted)
            if config.privacy.clip_quantile is not None and plan.kind == "fit":
                plan = replace(plan, arguments={**plan.arguments, CLIP: self._committer.clip})
            self._open = OpenExchange(plan, index, nodes, wanted, acc, log, self._bounds.next(number))
            if self._bound is not None:
                self._allow(self._messages.most(self._open, self.state.current))
            if buffered:
                self._buffered.fill(grid, self._open)
            elif config.privacy.secure_aggregation:
                self._hold_secure(grid, number)
            else:
                self._hold(grid, number)
            acc, accepted = self._open.acc, self._open.accepted
            if len(accepted) < min(config.quorum, wanted) or not accepted:
                self.state.counted = counted
                return acc, None
            taking_part |= accepted
            log.replies += self._open.replies
            norms += self._open.norms
            values += self._open.values
            estimates |= {node: self._open.estimates.get(node, {}) for node in accepted}
            self.state.counted |= {node: (self._open.begun[node][0], index) for node in accepted}
            nodes, wanted, index = sorted(accepted), len(accepted), index + 1
        self.state.estimates |= {node: estimate for node, estimate in estimates.items() if estimate}
        self.state.usual.learn(norms, values)
        self._bounds.name_outliers(log)
        return acc, taking_part

    def _hold_secure(self, grid: Grid, number: int) -> None:
        """Hold the open exchange as a session of secure aggregation, and fold the sum that it gives."""
        asked = self._opened
        place = f"{self._messages.run}/{number}/{asked.index}"
        declared = self._roster.declared
        secure = Secure(
            self.config, self.codecs.up, place, declared, asked.limits.examples,
            agreed=self._messages.signatures is not None, task=self._messages.task(asked, self.state.current),
        )  # fmt: skip

        def hold(kind: str, nodes: list[int] | None) -> OpenExchange:
            exchange = asked.exchange if kind == asked.exchange.kind else Exchange(kind)
            whom = (asked.nodes, asked.wanted) if nodes is None else (nodes, len(nodes))
            self._open = OpenExchange(
                exchange, asked.index, *whom, None, asked.log, asked.limits, secure=secure
            )
            self._hold(grid, number)
            return self._open

        masked = secure.hold(asked.exchange.kind, hold)
        if isinstance(masked, OpenExchange):
            total = self.method.summed(asked.acc)
            assert total is not None
            try:
                secure.add_to(total)
                self._open = replace(masked, acc=asked.acc)
                return
            except RunFailed as error:
                masked = str(error)
        asked.log.lack = masked
        self.store.event("secure", f"round {number}: {masked}", round=number)
        self._open = asked

    def _hold(self, grid: Grid, number: int) -> None:
        """Hold the open exchange: ask, fold, and say who stayed silent."""
        opened = self._opened
        kind = opened.exchange.kind
        told: dict[str, Any] = {"round": number, "need": opened.wanted, "rounds": self.config.rounds}
        deadline_s = self._patience_s
        timed = None if self._clock is None else Timed(self._clock, opened, self._take)
        asked = self.configure_train(number, ArrayRecord(), None, grid)
        told["closes_at"] = time.time() + deadline_s
        self._say(kind, have=0, urgent=True, **told)

        def receive(message: Message, flower_id: int) -> Message | None:
            again = (timed.hold if timed else self._take)(self._roster.number_of(flower_id), message)
            if not self._networked:
                told["closes_at"] = time.time() + deadline_s
            self._say(kind, have=timed.held if timed else len(opened.accepted), **told)
            return again

        converse(
            grid,
            timed.asking(asked) if timed else asked,
            receive=receive,
            missing=lambda: timed.missing if timed else opened.missing,
            deadline_s=deadline_s,
            simulated=not self._networked,
            meanwhile=lambda: self._admission.look(grid),
        )
        late = timed.close() if timed else {}
        silent = [node for node in opened.nodes if node not in opened.answered]
        for node in silent:
            if opened.missing:
                reason = late.get(node, "no reply before the deadline")
                opened.log.outcome(node, kind, "late", reason=reason)
            else:
                opened.log.outcome(node, kind, "unused", reason="not needed: enough replies came first")
        silent = [node for node in silent if node not in late]
        if silent and opened.missing and not self._networked:
            waited = "server.deadline_s = " if self._clock is None else ""
            sentence = (
                f"round {number} closed without {len(silent)} of its clients, as none answered for "
                f"{waited}{deadline_s:g} seconds: a faster machine comes to other numbers"
            )
            self.store.event("warning", sentence, round=number, nodes=silent)

    def _allow(self, most: int) -> None:
        """Let replies have so many bytes; those to an earlier exchange may still be on their way."""
        if self._bound is not None and most > self._most:
            self._most = most
            self._bound(most)

    def _score(self, number: int) -> dict[str, float]:
        every = self.config.evaluation.every
        if self._evaluate is None or not every or (number % every and number != self.config.rounds):
            return {}
        self._say("evaluate", round=number, rounds=self.config.rounds, urgent=True)
        return self._evaluate(self.state.current.tensors)

    def _evaluate_clients(
        self, grid: Grid, number: int, log: RoundLog, nodes: list[int]
    ) -> dict[int, wire.Reply]:
        """Let clients measure the global tensors on their own held-out texts."""
        held_out = [member.held_out for member in self._roster.members.values()]
        bounds = gates.limits(self.config.server, held_out, None)
        self._open = OpenExchange(Exchange("evaluate"), 0, nodes, len(nodes), None, log, bounds)
        self._hold(grid, number)
        return self._opened.accepted

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
        return None, MetricRecord({**averages(self._opened.accepted)})

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
        content = self._messages.write(node, opened, self.state.current, self.state.counted.get(node, (0, 0)))
        flower_id = self._roster.members[node].flower_id
        # What waits for its turn in a simulation is as good as new.
        ttl = self.config.server.deadline_s if self._networked else None
        return Message(content, flower_id, "train", ttl=ttl, group_id=str(opened.log.number))

    def _take(self, node: int, message: Message) -> Message | None:
        """Take in one reply; may return a message to send again."""
        again = self._intake.take(self._opened, node, message, self.state.current)
        return self._message(node) if again else None

    def _say(self, phase: str, *, urgent: bool = False, **facts: Any) -> None:
        """Tell followers what is going on, at most ten times a second."""
        now = time.monotonic()
        if urgent or now - self._spoke > 0.1:
            self._spoke = now
            self.store.phase(phase, **facts)


def _crossings(number: int) -> int:
    """Times that FedAvg of the whole model moves it per client in a round.

    Up and down, but not down before the first round: everybody has the pretrained model already.
    """
    return min(number, 2)
