"""One round in which strong devices train and weak ones probe, on the same global tensors.

    client that trains   takes local steps on its own texts, sends its change u_k
    client that probes   draws one batch, sends slopes c_i of its loss along directions v_i, i = 1..P, drawn
                         from (seed, round, client, i): 4 P bytes, in the memory of inference
    server               w <- w + u + a (L d - u): see :mod:`strategies.mixed.combining`

Whether a client trains or probes follows from configuration and number. Tensors that are not probed take the
mean change of those that train; in a round in which nobody trained, all of L d, as long as the last update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property

import numpy as np
import torch

from fedllm.config import RunConfig
from fedllm.data.tokens import Batch
from fedllm.errors import ConfigError, ModelError, RunFailed
from fedllm.host.allocator import give_back_large_blocks
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.models.training import stride
from fedllm.randomness import stream
from fedllm.sums import WeightedSum
from fedllm.tensors import Spec, Tensors, TensorSpec, spec_of
from strategies.averaging import train
from strategies.base import Answer, Commit, Exchange, Method, Reply, State, Step, Work
from strategies.forward.activations import ActivationCache
from strategies.forward.cohort import Cohort
from strategies.forward.directions import Direction
from strategies.forward.outlook import announce
from strategies.forward.probing import Prober
from strategies.forward.uploads import check_codecs
from strategies.forward.vectors import Flat, entries, flatten, shaped
from strategies.mixed.combining import Spread, descent, error, share_of_probes, square
from strategies.mixed.options import Options
from strategies.tryout import require_slopes, undone

__all__ = ["Mixed", "Options"]

_LENGTH = "length"
"""Of the last round's updates, in the server's memory."""


@dataclass
class MixedAccumulator:
    """What one round has folded so far."""

    number: int
    updates: WeightedSum
    spread: Spread
    cohort: Cohort


class Mixed(Method):
    """Clients train or probe; the server weighs updates and slopes by their errors."""

    Options = Options

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options = options = Options.model_validate(config.options)
        if options.nodes and options.share is not None:
            raise ConfigError("mixed.nodes says which clients probe: leave mixed.share out")
        if beyond := [node for node in options.nodes if not 0 <= node < config.clients]:
            raise ConfigError(
                f"mixed.nodes names client {beyond[0]}, and clients are 0 to {config.clients - 1}"
            )
        check_codecs(config, fresh="a codec without it", replayed=False)
        self.probe = Prober(
            config,
            options.estimator,
            options.distribution,
            options.radius,
            options.parallel,
            ActivationCache(options.cache_bytes),
        )

    @cached_property
    def probing(self) -> frozenset[int]:
        """Numbers of the clients that probe."""
        if self.options.nodes:
            return frozenset(self.options.nodes)
        share = 0.5 if self.options.share is None else self.options.share
        order = stream(self.config.seed, "mixed").permutation(self.config.clients)
        return frozenset(order[: round(share * self.config.clients)].tolist())

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with what is trained, and say how well probes can point.

        Raises:
            ModelError: ``mixed.probed`` names nothing that is trained.
        """
        if self.options.estimator == "antithetic":
            give_back_large_blocks()
        model = models.load(self.config, labels)
        probed = self._probed(model.trainable())
        if not probed:
            raise ModelError(
                f"mixed.probed = {list(self.options.probed)} names none of the trained tensors, such as "
                f"{min(model.trainable())}"
            )
        if self.probing:
            announce(probed, self.options.directions * len(self.probing), "mixed.directions")
        return model

    def try_out(self, model: Model, batch: Batch) -> list[str]:
        """Server: try steps down the gradient, and slopes the way clients will measure them."""
        notes, options = super().try_out(model, batch), self.options
        with undone(model):
            require_slopes(model, batch, options.estimator, options.radius, options.parallel)
        return notes

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect an update of every global tensor of clients that train."""
        return spec_of(tensors)

    def expected(self, exchange: Exchange, view: Tensors, node: int) -> Spec:
        """Expect P slopes of a client that probes."""
        if node in self.probing:
            return {"slopes": TensorSpec((self.options.directions,))}
        return self.spec(exchange, view)

    def gated(self, node: int) -> bool:
        """Of slopes only the direction counts, however long they are."""
        return node not in self.probing

    def stride(self, tensors: Tensors) -> float:
        """Server: as long as local training makes an update."""
        return stride(self.config.training, tensors)

    def begin(self, state: State, round: int) -> MixedAccumulator:
        """Start empty."""
        return MixedAccumulator(round, WeightedSum(spec_of(state.tensors)), Spread(), Cohort(round))

    def plan(self, state: State, acc: MixedAccumulator) -> Exchange | Commit:
        """Ask once; there is no setup."""
        return Commit() if acc.number == 0 or acc.updates.count or acc.cohort.slopes else Exchange("fit")

    def run(self, work: Work) -> Answer:
        """Client: train, or probe."""
        if work.node not in self.probing:
            return train(self.config, work, self.config.training.local_steps)
        directions = [
            Direction(self.config.seed, work.round, work.node, index)
            for index in range(self.options.directions)
        ]
        measured, cost = self.probe(work, directions, sorted(self._probed(work.tensors)))
        told = {"gradient_norm": math.sqrt(float(np.mean(measured.astype(np.float64) ** 2)))}
        return Answer({"slopes": torch.from_numpy(measured)}, len(work.train), told, passes=cost)

    def fold(self, acc: MixedAccumulator, kind: str, reply: Reply) -> MixedAccumulator:
        """Server: add an update, or note slopes under the client's number."""
        if reply.node in self.probing:
            acc.cohort.extend(reply.node, reply.tensors["slopes"].numpy(), reply.examples)
            return acc
        acc.updates.add(reply.tensors, reply.examples)
        acc.spread.add(reply.node, reply.examples, square(flatten(self._probed(reply.tensors))))
        return acc

    def step(self, state: State, acc: MixedAccumulator) -> Step:
        """Server: take the mean update, and of what was probed a share of the steps that slopes tell."""
        memory, report = dict(state.memory), {"probing": float(len(acc.cohort.slopes))}
        changes = acc.updates.mean() if acc.updates.count else {}
        if acc.number and not changes and self.options.weight == "none":
            raise RunFailed(
                f'nobody who trains answered in round {acc.number}, and mixed.weight = "none" leaves out who '
                "probes: take another weight, raise server.sample, or lower mixed.share"
            )
        if acc.updates.count:
            memory[_LENGTH] = torch.tensor(acc.spread.length(), dtype=torch.float64)
        if acc.cohort.slopes and self.options.weight != "none":
            probed = self._probed(state.tensors)
            found, weight = self._combined(self._probed(changes), probed, acc, self._length(memory, probed))
            changes |= found
            report["share"] = weight
        after = {name: old + changes[name] if name in changes else old for name, old in state.tensors.items()}
        return Step(after, memory, report)

    def _length(self, memory: Tensors, probed: Tensors) -> float:
        """Return how long an update is: in this round, else in the last that had one, else as expected."""
        return float(memory[_LENGTH]) if _LENGTH in memory else stride(self.config.training, probed)

    def _combined(
        self, changes: Tensors, probed: Tensors, acc: MixedAccumulator, length: float
    ) -> tuple[Tensors, float]:
        """Return the change of what is probed, and the share in it of what slopes tell."""
        values = entries(probed)
        told = length * descent(acc.cohort, self.config.seed, values, self.options.distribution)
        if not changes:
            return shaped(told, probed), 1.0
        mean = flatten(changes)
        weight = self._weight(acc, mean, told, length)
        return shaped(mean + weight * (told - mean), probed), weight

    def _weight(self, acc: MixedAccumulator, mean: Flat, told: Flat, length: float) -> float:
        if self.options.weight == "texts":
            probing = sum(acc.cohort.examples.values())
            return probing / (probing + sum(acc.spread.texts.values()))
        noise = length**2 * error(acc.cohort, len(mean))
        return share_of_probes(acc.spread.variance(square(mean)), noise, square(told - mean))

    def _probed(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Leave out what clients that probe leave alone."""
        patterns = self.options.probed
        return {
            name: tensor
            for name, tensor in tensors.items()
            if any(fnmatch(name, pattern) for pattern in patterns)
        }
