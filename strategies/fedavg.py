"""FedAvg (McMahan et al., AISTATS 2017, algorithm 1): every client tunes the whole model, the server averages.

    client k   w_k <- local steps from w on its own texts;  sends w_k - w and its number of texts n_k
    server     w  <- w + sum_k n_k (w_k - w) / sum_k n_k
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm import models
from fedllm.accumulator import WeightedSum
from fedllm.config import RunConfig, Section
from fedllm.errors import ConfigError, WireError
from fedllm.models import Model
from fedllm.randomness import stream
from fedllm.tensors import Spec, Tensors, spec_of
from fedllm.training import descend, minibatches
from strategies.base import Answer, Commit, Exchange, Passes, Reply, State, Work

__all__ = ["METHOD", "FedAvg", "Options"]


class Options(Section):
    """FedAvg has no options of its own."""


@dataclass
class Round:
    """What one round has folded so far."""

    number: int
    updates: WeightedSum


class FedAvg:
    """Full fine-tuning, averaged by numbers of texts."""

    Options = Options

    def __init__(self, config: RunConfig) -> None:
        if config.tuning.peft not in ("lora", "full"):  # "lora" is the default of a section that does not apply
            raise ConfigError(
                f'method = "fedavg" tunes the whole model, tuning.peft = "{config.tuning.peft}" does not: '
                'use method = "lora", or tuning.peft = "full"'
            )
        self.config = config.model_copy(update={"tuning": config.tuning.model_copy(update={"peft": "full"})})

    def build(self, labels: tuple[str, ...]) -> Model:
        return models.load(self.config, labels)

    def spec(self, kind: str, tensors: Tensors) -> Spec:
        return spec_of(tensors)

    def begin(self, state: State, round: int) -> Round:
        return Round(round, WeightedSum(spec_of(state.tensors)))

    def plan(self, state: State, acc: Round) -> Exchange | Commit:
        return Commit() if acc.number == 0 or acc.updates.count else Exchange("fit")

    def run(self, work: Work) -> Answer:
        training, model = self.config.training, work.model
        generator = stream(self.config.seed, "batches", work.round, work.node)
        batches = minibatches(work.train, training.batch_size, training.local_steps, generator)
        parameters = list(model.trainable().values())
        losses = descend(parameters, lambda batch: model.forward(batch).loss, batches, training, work.progress)
        update = {name: after - work.tensors[name] for name, after in model.read().items()}
        steps = len(losses)
        return Answer(update, len(work.train), {"loss": sum(losses) / steps}, passes=Passes(steps, steps))

    def fold(self, acc: Round, kind: str, reply: Reply) -> Round:
        acc.updates.add(reply.tensors, reply.examples)
        return acc

    def step(self, state: State, acc: Round) -> tuple[Tensors, Tensors]:
        if acc.number == 0:
            return state.tensors, state.memory
        update = acc.updates.mean()
        return {name: old + update[name] for name, old in state.tensors.items()}, state.memory

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        raise WireError("fedavg never sends a replay")


METHOD = FedAvg
