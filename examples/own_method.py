"""A method of one's own: the server takes a trimmed mean, which a few broken clients cannot pull far.

    coordinate by coordinate: drop the share ``trim`` at each end, average the rest

(Yin et al., ICML 2018, definition 2). Clients train adapters as in FedAvg.

    python examples/own_method.py
    fedllm simulate --plugin examples/own_method.py --set method=trimmed_mean --set trimmed_mean.trim=0.2

A plug-in that others install keeps its options in a module that imports no torch, and names them as an entry
point of the group ``fedllm.methods``.
"""

from dataclasses import dataclass, field

import torch
from pydantic import Field

import fedllm
from fedllm.config import MethodOptions, RunConfig
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.models.training import descend, minibatches
from fedllm.randomness import stream
from fedllm.tensors import Spec, Tensors, spec_of
from strategies.base import Answer, Commit, Exchange, Method, Passes, Reply, State, Step, Work


class Options(MethodOptions):
    """Options of the trimmed mean; they stand in the section ``[trimmed_mean]``."""

    method = "trimmed_mean"
    implementation = "own_method:TrimmedMean"

    trim: float = Field(0.25, ge=0.0, lt=0.5)
    """Share of the clients that is left out at each end of every coordinate."""


@dataclass
class Updates:
    """The updates of one round, by client: memory grows with the cohort."""

    number: int
    updates: dict[int, Tensors] = field(default_factory=dict)


class TrimmedMean(Method):
    """Clients train an adapter; the server takes the trimmed mean of what changed."""

    Options = Options

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.trim = Options.model_validate(config.options).trim

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with its adapter."""
        return models.load(self.config, labels)

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect an update of every global tensor."""
        return spec_of(tensors)

    def run(self, work: Work) -> Answer:
        """Client: train on its own texts, send the update."""
        training, model = self.config.training, work.model
        generator = stream(self.config.seed, "batches", work.round, work.node)
        batches = minibatches(work.train, training.batch_size, training.local_steps, generator)
        losses = descend(list(model.trainable().values()), model.loss, batches, training, work.progress)
        update = {name: after - work.tensors[name] for name, after in model.read().items()}
        steps = len(losses)
        return Answer(update, len(work.train), {"loss": sum(losses) / steps}, passes=Passes(steps, steps))

    def begin(self, state: State, round: int) -> Updates:
        """Start a round; 0 is the setup."""
        return Updates(round)

    def plan(self, state: State, acc: Updates) -> Exchange | Commit:
        """Ask for local training once, then commit."""
        return Commit() if acc.number == 0 or acc.updates else Exchange("fit")

    def fold(self, acc: Updates, kind: str, reply: Reply) -> Updates:
        """Keep an update."""
        acc.updates[reply.node] = reply.tensors
        return acc

    def step(self, state: State, acc: Updates) -> Step:
        """Go by the trimmed mean of all updates."""
        if not acc.updates:
            return Step(state.tensors, state.memory)
        cut = int(self.trim * len(acc.updates))
        updates = [acc.updates[node] for node in sorted(acc.updates)]
        after = {}
        for name, old in state.tensors.items():
            ordered = torch.stack([update[name] for update in updates]).sort(dim=0).values
            after[name] = old + ordered[cut : len(updates) - cut].mean(dim=0)
        return Step(after, state.memory)


if __name__ == "__main__":
    run = fedllm.simulate(
        "quickstart",
        {"trimmed_mean.trim": 0.25},
        method="trimmed_mean",
        plugins=[__file__],
        clients=4,
        rounds=2,
        name="trimmed",
    )
    print(f"{run.config.method}: accuracy {run.metrics['accuracy']:.3f}")
