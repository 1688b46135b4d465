"""Zeroth-order local steps, averaged: MeZO's step in a federation, and FedKSeed. Rivals of FwdLLM.

    round r    client k  for each local step: draws a batch and a direction v_j, measures the slope
                         c = (f(w + h v_j) - f(w - h v_j)) / 2h, w <- w - eta c v_j   (MeZO, algorithm 1)
               candidates = 0: directions are the client's own; sends the slopes, one float a step
               candidates = K: directions come from K that all share; sends the sum of slopes of each
                         (FedKSeed, ICML 2024, algorithm 1), K floats however many the steps
    both sides           w <- w - eta sum_k n_k / n * sum_j (slopes of k along v_j) v_j

Unlike FwdLLM, every slope is taken at another point, so that probes cannot be batched. What lies below the
lowest trained layer is computed once per text all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fedllm.config import RunConfig
from fedllm.data.tokens import Batch
from fedllm.errors import ConfigError, WireError
from fedllm.host.allocator import give_back_large_blocks
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.models.training import drawn, learning_rate
from fedllm.randomness import stream
from fedllm.sums import WeightedSum
from fedllm.tensors import Spec, Tensors, TensorSpec
from strategies.base import Answer, Commit, Exchange, Method, Replay, Reply, State, Step, Work
from strategies.forward.activations import ActivationCache
from strategies.forward.cohort import Cohort, gradient, pack_cohort, unpack_cohort
from strategies.forward.directions import Direction, add_scaled, combine
from strategies.forward.outlook import announce
from strategies.forward.slopes import antithetic, batch_loss, settled
from strategies.forward.uploads import check_codecs, check_count, check_training
from strategies.forward.vectors import entries, flatten, norm, shaped
from strategies.mezo.options import Options
from strategies.private import plain_sum_of
from strategies.tryout import try_probes

__all__ = ["MeZO", "Options"]

_OWN, _SHARED = b"o", b"k"


@dataclass
class MeZOAccumulator:
    """What one round has folded so far: slopes by client, or sums by candidate."""

    number: int
    cohort: Cohort
    sums: WeightedSum | None


class MeZO(Method):
    """Clients walk along random directions; all that anyone needs to follow is how far."""

    Options = Options
    replays = True

    def __init__(self, config: RunConfig) -> None:
        if not config.server.plain:
            raise ConfigError(f"mezo replays its steps: {config.server.PLAINLY}")
        check_training(config)
        self.config = config
        self.options = Options.model_validate(config.options)
        self.cache = ActivationCache(self.options.cache_bytes)
        self.sums = self.private = self.options.candidates > 0
        check_codecs(config, fresh="" if self.options.candidates else "mezo.candidates", replayed=True)
        if not self.options.candidates:
            steps = config.training.local_steps
            check_count(steps, f"training.local_steps = {steps}")

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with its adapter, and say what a round can be expected to achieve."""
        give_back_large_blocks()
        model = models.load(self.config, labels)
        announce(
            model.trainable(), self.config.cohort * self.config.training.local_steps, "training.local_steps"
        )
        return model

    def try_out(self, model: Model, batch: Batch) -> list[str]:
        """Server: measure slopes, the way clients will: without a backward pass."""
        return try_probes(model, batch, self.options.radius)

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect one float per local step, or per candidate."""
        return {"slopes": TensorSpec((self.options.candidates or self.config.training.local_steps,))}

    def stride(self, tensors: Tensors) -> float:
        """Server: slopes whose walk is as long as the weights themselves; directions have entries of +-1."""
        weights = max(norm(flatten(tensors)), 1.0)
        return weights / (self.config.training.learning_rate * math.sqrt(entries(tensors)))

    def begin(self, state: State, round: int) -> MeZOAccumulator:
        """Start empty."""
        spec = self.spec(Exchange("fit"), state.tensors)
        total = plain_sum_of(self.config, spec) if self.options.candidates else None
        return MeZOAccumulator(round, Cohort(round), total)

    def plan(self, state: State, acc: MeZOAccumulator) -> Exchange | Commit:
        """Ask for local steps once; there is no setup."""
        asked = acc.cohort.slopes or (acc.sums is not None and acc.sums.count)
        return Commit() if acc.number == 0 or asked else Exchange("fit")

    def run(self, work: Work) -> Answer:
        """Client: walk, and say how far along which direction."""
        training, seed = self.config.training, self.config.seed
        steps, candidates = training.local_steps, self.options.candidates
        rate = self._rate(work.round)
        source = stream(seed, "batches", work.round, work.node)
        batches = drawn(len(work.train), training.batch_size, steps, source)
        picks = stream(seed, "candidates", work.round, work.node).integers(max(candidates, 1), size=steps)
        tensors: Tensors = {name: p.detach() for name, p in work.model.trainable().items()}
        slopes = np.zeros(candidates or steps, dtype=np.float32)
        shortcut = self.cache.open(work.model, work.train, use=self.options.cache)
        with settled(work.model.module):
            for step, indices in enumerate(batches):
                place = int(picks[step]) if candidates else step
                direction = self._direction(work.round, work.node, place)
                loss = batch_loss(work.model, work.train.batch(indices))
                with shortcut.resumed(indices):
                    slope = float(antithetic(loss, tensors, [direction], radius=self.options.radius)[0])
                add_scaled(tensors, direction, -rate * slope)
                slopes[place] += np.float32(slope)
        answer: Tensors = {"slopes": torch.from_numpy(slopes)}
        return Answer(answer, len(work.train), {}, passes=shortcut.cost(2.0 * steps, self.config))

    def fold(self, acc: MeZOAccumulator, kind: str, reply: Reply) -> MeZOAccumulator:
        """Server: note a client's slopes, or add them up by candidate."""
        if acc.sums is not None:
            acc.sums.add(reply.tensors, reply.examples)
        else:
            acc.cohort.extend(reply.node, reply.tensors["slopes"].numpy(), reply.examples)
        return acc

    def summed(self, acc: MeZOAccumulator) -> WeightedSum | None:
        """Server: return the sums by candidate, where clients share their directions."""
        return acc.sums

    def step(self, state: State, acc: MeZOAccumulator) -> Step:
        """Server: hand on what was folded as a record."""
        if acc.number == 0:
            return Step(state.tensors, state.memory)
        if acc.sums is None:
            return Step(Replay(_OWN + pack_cohort(acc.cohort)), state.memory)
        mean = acc.sums.mean()["slopes"].numpy().astype("<f4").tobytes()
        return Step(Replay(_SHARED + acc.number.to_bytes(4, "little") + mean), state.memory)

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        """Both sides: take the clients' mean walk."""
        tag, body = record[:1], record[1:]
        if tag == _OWN and not self.options.candidates:
            cohort = unpack_cohort(body)
            rate = self._rate(cohort.round) * self.config.training.local_steps
            flat = gradient(cohort, self.config.seed, entries(tensors))
        elif tag == _SHARED and len(body) == 4 + 4 * self.options.candidates:
            rate = self._rate(int.from_bytes(body[:4], "little"))
            sums = np.frombuffer(body[4:], dtype="<f4")
            walked = {self._direction(0, 0, int(j)): float(sums[j]) for j in np.flatnonzero(sums)}
            flat = combine(walked, entries(tensors))
        else:
            raise WireError(f"a record of {len(record)} bytes is no step of mezo with these options")
        return shaped(flatten(tensors) - rate * flat, tensors)

    def _rate(self, round: int) -> float:
        # Rounded to float32, where the last bit of libm's cosine no longer shows.
        progress = (round - 1) / self.config.rounds
        return float(np.float32(learning_rate(self.config.training, progress)))

    def _direction(self, round: int, node: int, index: int) -> Direction:
        if self.options.candidates:
            round = node = 0
        return Direction(self.config.seed, round, node, index)
