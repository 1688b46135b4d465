"""Fine-tuning without backpropagation: FwdLLM (Xu et al., USENIX ATC 2024, algorithm 1), with scalar uploads.

    setup      client k  sends sums of its features by class; the server sets the head in closed form
    round r    client k  draws one batch; for each direction v_i, i = 1..P, drawn from (seed, r, k, i),
                         measures the slope c_i = grad f_k . v_i by forward passes; sends c (4 P bytes)
                         (candidates > 1: the v_i are chosen among more by the previous round's G)
               server    G = sum_k n_k / n * mean_i c_ki v_ki
                         while G is mostly noise, and the cap not reached: asks the same clients for P more
               both      w <- w - rho(r) ||w|| G / ||G||        (each rebuilds G from the cohort's slopes)

With ``shared`` all clients probe the same v_i, drawn from (seed, r, i). Of their slopes the server then needs
the weighted mean alone, which it records as one client's: a sum that can be had without seeing any of them.

Where all trained tensors start at zero (biases, OFT), ||w|| counts as at least that of as many fresh weights.

The two sides know the directions, so neither gradients nor weights travel.
"""

from __future__ import annotations

import logging
import math
from base64 import b85decode, b85encode
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.data.tokens import Batch, Tokens
from fedllm.errors import ConfigError, RunFailed, WireError
from fedllm.host.allocator import give_back_large_blocks
from fedllm.models import model as models
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model
from fedllm.sums import WeightedSum
from fedllm.tensors import Spec, Tensors, TensorSpec, dense_bytes, spec_of
from strategies.base import Answer, Commit, Exchange, Method, Replay, Reply, State, Step, Work
from strategies.forward.activations import ActivationCache, FeatureCache, stack_of
from strategies.forward.cohort import MOST_INDICES, Cohort, gradient, halves, pack_cohort, unpack_cohort
from strategies.forward.directions import Direction, Kind
from strategies.forward.outlook import announce, warn_of_setup
from strategies.forward.probing import Prober
from strategies.forward.slopes import Slopes, settled
from strategies.forward.uploads import check_codecs, check_count, check_training
from strategies.forward.vectors import Flat, entries, flatten, norm, shaped
from strategies.fwdllm.options import Options
from strategies.fwdllm.pacing import Gate, signal_to_noise, stretch
from strategies.fwdllm.selection import Choice, choose
from strategies.fwdllm.warm_start import (
    counted,
    head,
    pack_head,
    statistics,
    statistics_spec,
    unpack_head,
)
from strategies.private import plain_sum_of
from strategies.tryout import require_slopes, try_probes, undone

__all__ = ["FwdLLM", "Options", "decay"]

logger = logging.getLogger(__name__)

_HEAD, _SLOPES = b"h", b"s"
_GUIDE = "guide"
"""The previous round's record, in the server's memory and among an exchange's arguments."""
_EVERYBODY = 0
"""Number in whose name shared directions are drawn, and the mean of all slopes along them is recorded."""
_WEIGHT, _BIAS = "head.weight", "head.bias"
_USUAL_SIZE = 0.02
"""Root mean square of a fresh weight in most language models (``initializer_range``)."""


@dataclass
class FwdLLMAccumulator:
    """What one round has folded so far; the last four serve the modes that need them."""

    number: int
    cohort: Cohort
    entries: int
    guide: bytes
    dense: WeightedSum | None = None
    shared: WeightedSum | None = None
    statistics: WeightedSum | None = None
    measured: float | None = None


class FwdLLM(Method):
    """Clients measure slopes; the server, and every client, rebuild the step."""

    Options = Options
    replays = True

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options = Options.model_validate(config.options)
        _check(config, self.options)
        self.sums = self.options.shared or self.options.upload == "dense"
        self.private = self.options.shared and self.options.warm_start == "none"
        self.gate = Gate(self.options.pacing, self.options.threshold, self.options.max_exchanges)
        self.cache = ActivationCache(self.options.cache_bytes)
        self.probe = Prober(
            config,
            self.options.estimator,
            self.kind,
            self.options.radius,
            self.options.parallel,
            self.cache,
            use_cache=self.options.cache,
        )
        self.features = FeatureCache(self.options.cache_bytes if self.options.cache else 0)
        self._least_norm = 0.0

    @property
    def kind(self) -> Kind:
        """Distribution of the directions."""
        return self.options.distribution

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with its adapter, and say what a round can be expected to achieve."""
        if self.options.estimator == "antithetic":
            give_back_large_blocks()
        model = models.load(self.config, labels)
        probed = self.options.directions * (1 if self.options.shared else self.config.cohort)
        announce(model.trainable(), probed, "fwdllm.directions", self.kind)
        stack = stack_of(model.module)
        if self.options.cache and stack.frozen:
            logger.info("hidden states of %d of %d layers are cached", stack.frozen, len(stack.layers))
        parameters = model.trainable().values()
        if not any(bool(parameter.any()) for parameter in parameters):
            self._least_norm = _USUAL_SIZE * math.sqrt(sum(parameter.numel() for parameter in parameters))
        if self.options.warm_start != "none":
            tensors = model.read()
            least = dense_bytes(statistics_spec("means", *tensors[_WEIGHT].shape))
            warn_of_setup(self.options.warm_start, dense_bytes(self._statistics_spec(tensors)), least)
        return model

    def try_out(self, model: Model, batch: Batch) -> list[str]:
        """Server: measure slopes too, the way clients will; antithetic ones need no backward pass."""
        options = self.options
        if options.estimator == "antithetic":
            return try_probes(model, batch, options.radius)
        notes = super().try_out(model, batch)
        with undone(model):
            require_slopes(model, batch, options.estimator, options.radius, options.parallel)
        return notes

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect P slopes and nothing else; in the setup, statistics; a dense gradient if asked for."""
        if exchange.kind == "setup":
            return self._statistics_spec(tensors)
        if self.options.upload == "dense":
            return spec_of(tensors)
        return {"slopes": TensorSpec((self.options.directions,))}

    def stride(self, tensors: Tensors) -> float | None:
        """Server: replies whose step is as long as the weights; trust and Adam's steps have theirs anyway."""
        options = self.options
        if options.step == "trust" or self.config.server.optimizer in ("adam", "yogi"):
            return None
        gradient = max(norm(flatten(tensors)), 1.0) / options.learning_rate
        if options.upload == "dense":
            return gradient
        # The mean over P directions of unlike sign, each of length sqrt(d).
        return gradient * options.directions / math.sqrt(entries(tensors))

    def begin(self, state: State, round: int) -> FwdLLMAccumulator:
        """Start an empty cohort."""
        guide = state.memory.get(_GUIDE, torch.empty(0, dtype=torch.uint8)).numpy().tobytes()
        acc = FwdLLMAccumulator(round, Cohort(round), entries(state.tensors), guide)
        if round == 0 and self.options.warm_start != "none":
            acc.statistics = WeightedSum(self._statistics_spec(state.tensors))
        if self.options.upload == "dense":
            acc.dense = WeightedSum(spec_of(state.tensors))
        if self.options.shared:
            acc.shared = plain_sum_of(self.config, self.spec(Exchange("fit"), state.tensors))
        return acc

    def plan(self, state: State, acc: FwdLLMAccumulator) -> Exchange | Commit:
        """Ask for statistics once, or for slopes until the gate passes or the cap is reached."""
        if acc.number == 0:
            wanted = acc.statistics is not None and not acc.statistics.count
            return Exchange("setup") if wanted else Commit()
        if acc.dense is not None:
            return Commit() if acc.dense.count else Exchange("fit")
        more = Exchange("fit", {_GUIDE: b85encode(acc.guide).decode()} if acc.guide else {})
        if not acc.cohort.slopes and (acc.shared is None or not acc.shared.count):
            return more
        if self.options.pacing == "fixed":
            return Commit()
        # Measured at the last exchange too, where it decides nothing: a round reports what it commits with.
        a, b = halves(acc.cohort, self.config.seed, entries(state.tensors), self.kind)
        acc.measured = self.gate.measure(a, b, stretch(state.tensors, self.options.pacing_tensor))
        asked = max(len(found) for found in acc.cohort.slopes.values()) // self.options.directions
        return Commit() if self.gate.exhausted(asked) or self.gate.passes(acc.measured) else more

    def run(self, work: Work) -> Answer:
        """Client: measure slopes on one batch; asked again in a round, on the same batch further on."""
        if work.kind == "setup":
            return self._start(work)
        choice = self._choose(work.round, work.node, work.index, _guide_of(work), entries(work.tensors))
        measured, cost = self.probe(work, self._directions(work.round, work.node, choice.indices))
        rms = math.sqrt(float((choice.weights * measured.astype(np.float64) ** 2).mean()))
        if self.options.upload == "scalars":
            answer: Tensors = {"slopes": torch.from_numpy(measured)}
        else:
            alone = Cohort(work.round, {work.node: measured}, {work.node: 1})
            flat = gradient(alone, self.config.seed, entries(work.tensors), self.kind)
            answer = shaped(flat, work.tensors)
        # For Rademacher directions E c^2 = ||grad f||^2: the slopes measure the gradient's norm for free.
        return Answer(answer, len(work.train), {"gradient_norm": rms}, passes=cost)

    def _choose(self, round: int, node: int, exchange: int, guide: bytes, entries: int) -> Choice:
        """Both sides: which of a client's directions are probed in this exchange of a round."""
        count = self.options.directions
        pool = np.arange(count * self.options.candidates) + exchange * count * self.options.candidates
        if not guide:
            return Choice(pool[:count], np.ones(count))
        flat = _rebuilt(guide, self.config.seed, entries, self.kind)
        choice = choose(flat, self._directions(round, node, pool), count, self.kind)
        return Choice(pool[choice.indices], choice.weights)

    def _directions(self, round: int, node: int, indices: np.ndarray) -> list[Direction]:
        drawn_by = _EVERYBODY if self.options.shared else node
        return [Direction(self.config.seed, round, drawn_by, int(i)) for i in indices]

    def _start(self, work: Work) -> Answer:
        """Sum features for the closed-form head."""
        model, network, labels = work.model, work.model.module, work.train.labels
        assert labels is not None
        shortcut = self.cache.open(model, work.train, use=self.options.cache)

        def features(indices: np.ndarray) -> torch.Tensor:
            with shortcut.resumed(indices):
                return network.features(**work.train.batch(indices).to(model.device).inputs())

        with settled(network):
            found = statistics(features, labels, self._statistics_spec(work.tensors))
        cost = shortcut.cost(len(work.train) / self._batch_size, self.config)
        return Answer(found, len(work.train), {}, passes=cost)

    @property
    def _batch_size(self) -> int:
        return self.config.training.batch_size

    def score(self, model: Model, test: Tokens) -> dict[str, float]:
        """Server: score a model; from the second time on without its frozen lower layers."""
        around = partial(self.features.around, model)
        return evaluate(model, test, self.config.evaluation.batch_size, around)

    def fold(self, acc: FwdLLMAccumulator, kind: str, reply: Reply) -> FwdLLMAccumulator:
        """Server: note a client's slopes under its number."""
        if kind == "setup":
            assert acc.statistics is not None
            claimed = max(reply.claimed, reply.examples)
            acc.statistics.add(counted(reply.tensors, claimed, reply.examples), 1)
        elif acc.dense is not None:
            acc.dense.add(reply.tensors, reply.examples)
        elif acc.shared is not None:
            acc.shared.add(reply.tensors, reply.examples)
        else:
            self._note(acc, reply.node, reply.tensors["slopes"].numpy(), reply.examples)
        return acc

    def _note(self, acc: FwdLLMAccumulator, node: int, slopes: Slopes, examples: int) -> None:
        """Server: note slopes along the directions that a client has probed in this exchange."""
        exchange = len(acc.cohort.slopes.get(node, ())) // self.options.directions
        choice = self._choose(acc.number, node, exchange, acc.guide, acc.entries)
        numbers = choice.indices if self.options.candidates > 1 else None
        acc.cohort.extend(node, (slopes * choice.weights).astype(np.float32), examples, numbers)

    def summed(self, acc: FwdLLMAccumulator) -> WeightedSum | None:
        """Server: return the sum of slopes along shared directions, or of dense gradients."""
        return acc.shared if acc.dense is None else acc.dense

    def step(self, state: State, acc: FwdLLMAccumulator) -> Step:
        """Server: propose the step as a record of slopes, and watch that the weights do not blow up."""
        if acc.number == 0:
            if acc.statistics is None or not acc.statistics.count:
                return Step(state.tensors, state.memory)
            found = head(self.options.warm_start, acc.statistics.total())
            return Step(Replay(_HEAD + pack_head(*found)), state.memory)
        if acc.shared is not None:
            self._note(acc, _EVERYBODY, acc.shared.mean()["slopes"].numpy(), 1)
        record = _SLOPES + pack_cohort(acc.cohort)
        if acc.dense is not None:
            after = self._stepped(state.tensors, flatten(acc.dense.mean()), acc.number)
        else:
            after = self.replay(state.tensors, record)
        # What the server's optimiser makes of a step shows in the next round's weights.
        memory, growth = self._watch(state, after if self.config.server.plain else state.tensors)
        if self.options.candidates > 1:
            memory[_GUIDE] = torch.frombuffer(bytearray(record[1:]), dtype=torch.uint8)
        report = {"growth": growth, "directions": float(acc.cohort.directions)}
        if acc.measured is not None:
            report[self.options.pacing] = acc.measured
        elif acc.cohort.directions > 1 and self.kind != "orthogonal":  # whose halves are no two draws
            a, b = halves(acc.cohort, self.config.seed, acc.entries, self.kind)
            report["ratio"] = signal_to_noise(a, b)
        plain = self.config.server.plain
        return Step(Replay(record) if plain and acc.dense is None else after, memory, report)

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        """Both sides: rebuild the cohort's gradient from its slopes and take the step."""
        tag, body = record[:1], record[1:]
        if tag == _HEAD:
            weight, bias = unpack_head(body, *tensors[_WEIGHT].shape)
            return {**tensors, _WEIGHT: weight, _BIAS: bias}
        if tag != _SLOPES:
            raise WireError(f"unknown kind of replay record {tag!r}")
        cohort = unpack_cohort(body)
        flat = gradient(cohort, self.config.seed, entries(tensors), self.kind)
        return self._stepped(tensors, flat, cohort.round)

    def _stepped(self, tensors: Tensors, flat: np.ndarray, round: int) -> Tensors:
        """Take the step in float64 with sums that no machine rounds differently."""
        rate = self.options.learning_rate * decay(self.options.schedule, (round - 1) / self.config.rounds)
        weights = flatten(tensors)
        if self.options.step == "trust":
            length = norm(flat)
            rate = rate * max(norm(weights), self._least_norm) / length if length else 0.0
        return shaped(weights - rate * flat, tensors)

    def _watch(self, state: State, after: Tensors) -> tuple[Tensors, float]:
        """Remember the norm of the start; stop once the weights have grown out of proportion."""
        memory = dict(state.memory)
        start = memory.setdefault("start_norm", torch.tensor(norm(flatten(state.tensors))))
        growth = norm(flatten(after)) / max(float(start), self._least_norm)
        if not growth <= self.options.max_growth:
            raise RunFailed(
                f"the trained tensors have grown to {growth:.1f} times their norm at the start "
                f"(fwdllm.max_growth = {self.options.max_growth:g}), which noisy steps do before accuracy "
                f"collapses; lower fwdllm.learning_rate = {self.options.learning_rate:g} or raise "
                f"fwdllm.directions = {self.options.directions}"
            )
        return memory, growth

    def _statistics_spec(self, tensors: Tensors) -> dict[str, TensorSpec]:
        classes, width = tensors[_WEIGHT].shape
        return statistics_spec(self.options.warm_start, classes, width)


def _check(config: RunConfig, options: Options) -> None:
    server = config.server
    if options.warm_start != "none" and not tasks.of(config).closed_form:
        raise ConfigError(
            f'fwdllm.warm_start = "{options.warm_start}" needs a linear head of ours: model.task = '
            '"classification" with model.pooling = "mean" or "cls"'
        )
    if options.warm_start != "none" and config.init_from is not None:
        raise ConfigError(
            f'fwdllm.warm_start = "{options.warm_start}" would replace the head that init_from brings: set '
            'fwdllm.warm_start = "none", or leave out init_from'
        )
    if options.step == "trust" and not server.plain:
        raise ConfigError(
            f'fwdllm.step = "trust" sets the length of the step itself: {server.PLAINLY}, or take '
            'fwdllm.step = "mean"'
        )
    if options.upload == "dense" and options.pacing != "fixed":
        raise ConfigError('fwdllm.upload = "dense" holds one exchange a round: fwdllm.pacing must be "fixed"')
    if options.upload == "dense" and options.candidates > 1:
        raise ConfigError(
            'fwdllm.upload = "dense" does not say which directions were chosen: leave fwdllm.candidates at 1'
        )
    if options.distribution == "orthogonal" and (options.pacing != "fixed" or options.candidates > 1):
        key = "candidates" if options.candidates > 1 else "pacing"
        raise ConfigError(
            'fwdllm.distribution = "orthogonal" deals directions out before any is probed: leave '
            f'fwdllm.{key} out, or take the distribution "rademacher"'
        )
    if options.shared and options.pacing != "fixed":
        raise ConfigError(
            "fwdllm.shared = true sums slopes over clients in one exchange a round: fwdllm.pacing must be "
            '"fixed"'
        )
    if options.shared and options.upload == "dense":
        raise ConfigError('fwdllm.upload = "dense" is a sum already: leave fwdllm.shared out')
    if config.privacy.secure_aggregation and options.warm_start != "none":
        raise ConfigError(
            f'fwdllm.warm_start = "{options.warm_start}" sums features in a setup, which '
            'privacy.secure_aggregation = true does not mask: set fwdllm.warm_start = "none"'
        )
    check_training(config)
    exchanges = 1 if options.pacing == "fixed" else options.max_exchanges
    if options.candidates > 1 and options.candidates * options.directions * exchanges > MOST_INDICES:
        raise ConfigError(
            f"fwdllm.candidates = {options.candidates} makes more than {MOST_INDICES:,} directions a client "
            "and round; lower it, fwdllm.directions or fwdllm.max_exchanges"
        )
    if options.upload == "scalars":
        keys = f"fwdllm.directions = {options.directions}"
        if exchanges > 1:
            keys += f" and fwdllm.max_exchanges = {exchanges}"
        check_count(options.directions * exchanges, keys)
        check_codecs(config, fresh='fwdllm.upload = "dense"', replayed=server.plain)
    if options.pacing != "fixed" and options.directions < 2 and config.cohort < 2:
        raise ConfigError("fwdllm.pacing compares two halves: ask for at least 2 directions or 2 clients")


def decay(schedule: str, progress: float) -> float:
    """Return the share of the learning rate that is left at ``progress`` in [0, 1].

    >>> decay("cosine", 0.5), decay("linear", 0.25)
    (0.5, 0.75)
    """
    if schedule == "cosine":
        # A polynomial in place of libm's cosine, whose last bit differs between machines: 1 - 3 t^2 + 2 t^3
        # stays within 0.011 of (1 + cos(pi t)) / 2.
        return 1.0 - progress * progress * (3.0 - 2.0 * progress)
    return 1.0 - progress if schedule == "linear" else 1.0


def _guide_of(work: Work) -> bytes:
    try:
        return b85decode(str(work.arguments.get(_GUIDE, "")))
    except ValueError as error:
        raise WireError("the previous round's slopes cannot be read from the instruction") from error


@lru_cache(maxsize=2)
def _rebuilt(record: bytes, seed: int, entries: int, kind: Kind) -> Flat:
    """Return a round's gradient; clients of one process ask for the same one."""
    return gradient(unpack_cohort(record), seed, entries, kind)
