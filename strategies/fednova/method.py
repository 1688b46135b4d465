"""Normalised averaging of unlike amounts of local work: FedNova (Wang et al., NeurIPS 2020).

    client k   w_k <- t_k local steps from w,  t_k = min(epochs n_k / B rounded up, training.local_steps)
               sends w_k - w and its number of texts n_k
    server     w  <- w + (sum_k p_k t_k) sum_k p_k (w_k - w) / t_k,  p_k = n_k / sum n of the cohort
                                                                      (eq. 6 and 8, a_k = (1, ..., 1))

Under FedAvg who takes more steps pulls harder, beyond its share of the texts, and the federation converges to
the optimum of another objective. Here each client's update counts as one step of its own, and the mean number
of steps is taken along their mean. Where all take as many steps this is FedAvg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.sums import WeightedSum
from fedllm.tensors import spec_of
from strategies.averaging import Averaging, MeanAccumulator, train
from strategies.base import Answer, Reply, State, Step, Work
from strategies.fednova.options import Options

__all__ = ["FedNova", "Options"]


@dataclass
class NormalisedMean(MeanAccumulator):
    """The sum of n_k (w_k - w) / t_k, and beside it that of n_k t_k."""

    steps: int = 0


class FedNova(Averaging):
    """Clients tune what ``tuning.peft`` says, each as long as its own texts last."""

    Options = Options

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options = Options.model_validate(config.options)
        if config.training.optimizer != "sgd" or config.training.proximal:
            raise ConfigError(
                'method = "fednova" counts every local step alike, which moments and a pull back do not: '
                'set training.optimizer = "sgd", and training.proximal to 0'
            )

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with what is trained."""
        return models.load(self.config, labels)

    def steps(self, texts: int) -> int:
        """Return t_k of a client with so many texts."""
        training = self.config.training
        return min(math.ceil(self.options.epochs * texts / training.batch_size), training.local_steps)

    def run(self, work: Work) -> Answer:
        """Client: train as long as its own texts last, send the update."""
        return train(self.config, work, self.steps(len(work.train)))

    def begin(self, state: State, round: int) -> NormalisedMean:
        """Start sums of updates and of steps."""
        return NormalisedMean(round, WeightedSum(spec_of(state.tensors)))

    def fold(self, acc: MeanAccumulator, kind: str, reply: Reply) -> MeanAccumulator:
        """Server: add one update per step that it took, weighted by its number of texts."""
        assert isinstance(acc, NormalisedMean)
        steps = self.steps(max(reply.claimed, reply.examples))
        acc.updates.add({name: value / steps for name, value in reply.tensors.items()}, reply.examples)
        acc.steps += reply.examples * steps
        return acc

    def step(self, state: State, acc: MeanAccumulator) -> Step:
        """Server: go the mean number of steps along the mean step."""
        assert isinstance(acc, NormalisedMean)
        if not acc.updates.count:
            return Step(state.tensors, state.memory)
        mean, steps = acc.updates.mean(), acc.steps / acc.updates.weight
        proposal = {name: old + steps * mean[name] for name, old in state.tensors.items()}
        return Step(proposal, state.memory, {"steps": steps})
