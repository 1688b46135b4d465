"""Full fine-tuning, averaged: FedAvg (McMahan et al., AISTATS 2017, algorithm 1).

    client k   w_k <- local steps from w on its own texts; sends w_k - w and its number of texts n_k
    server     w  <- w + sum_k n_k (w_k - w) / sum_k n_k

The federation's reference for quality and for bytes: every parameter travels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedllm import models
from fedllm.accumulator import WeightedSum
from fedllm.config import RunConfig, Section
from fedllm.data import Batch
from fedllm.errors import ConfigError
from fedllm.models import Model
from fedllm.randomness import stream
from fedllm.tensors import Spec, Tensors, spec_of
from fedllm.training import descend, minibatches
from strategies.base import Answer, Commit, Exchange, Method, Passes, Reply, State, Work

__all__ = ["METHOD", "FedAvg", "Options"]


class Options(Section):
    """FedAvg has no options of its own."""


@dataclass
class Round:
    """What one round has folded so far."""

    number: int
    updates: WeightedSum


class FedAvg(Method):
    """Every client tunes the whole model; the server averages by numbers of texts."""

    Options = Options

    def __init__(self, config: RunConfig) -> None:
        if config.tuning.peft not in ("lora", "full"):  # "lora" is the section's default: not asked for
            raise ConfigError(
                f'method = "fedavg" tunes the whole model, tuning.peft = "{config.tuning.peft}" does not: '
                'use method = "lora", or tuning.peft = "full"'
            )
        full = config.tuning.model_copy(update={"peft": "full"})
        self.config = config.model_copy(update={"tuning": full})

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with every parameter trainable."""
        return models.load(self.config, labels)

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect an update of every global tensor."""
        return spec_of(tensors)

    def begin(self, state: State, round: int) -> Round:
        """Start a sum of updates."""
        return Round(round, WeightedSum(spec_of(state.tensors)))

    def plan(self, state: State, acc: Round) -> Exchange | Commit:
        """Ask for local training once; there is no setup."""
        return Commit() if acc.number == 0 or acc.updates.count else Exchange("fit")

    def run(self, work: Work) -> Answer:
        """Client: train on its own texts, send the update."""
        training, model = self.config.training, work.model

        def loss(batch: Batch) -> torch.Tensor:
            value = model.forward(batch).loss
            assert value is not None  # every batch carries labels
            return value

        generator = stream(self.config.seed, "batches", work.round, work.node)
        batches = minibatches(work.train, training.batch_size, training.local_steps, generator)
        losses = descend(list(model.trainable().values()), loss, batches, training, work.progress)
        update = {name: after - work.tensors[name] for name, after in model.read().items()}
        steps = len(losses)
        return Answer(update, len(work.train), {"loss": sum(losses) / steps}, passes=Passes(steps, steps))

    def fold(self, acc: Round, kind: str, reply: Reply) -> Round:
        """Server: add one update, weighted by its number of texts."""
        acc.updates.add(reply.tensors, reply.examples)
        return acc

    def step(self, state: State, acc: Round) -> tuple[Tensors, Tensors]:
        """Server: take the mean update."""
        if not acc.updates.count:
            return state.tensors, state.memory
        update = acc.updates.mean()
        return {name: old + update[name] for name, old in state.tensors.items()}, state.memory


METHOD = FedAvg
