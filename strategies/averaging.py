"""What methods share whose clients send updates that are averaged.

    client k   w_k <- local steps from w on its own texts; sends w_k - w and its number of texts n_k

    server     w   <- w + sum_k n_k (w_k - w) / sum_k n_k

(McMahan et al., AISTATS 2017, algorithm 1), or what ``server.robust`` puts in the place of the mean. The
result is the same bits whatever the order of replies.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from fedllm.config import RunConfig
from fedllm.models.training import only, stride
from fedllm.sums import WeightedSum
from fedllm.tensors import Spec, Tensors, spec_of
from strategies.base import Answer, Commit, Exchange, Method, Reply, State, Step, Work
from strategies.blocks import Blocks
from strategies.private import sum_of
from strategies.robust import Kept
from strategies.steps import take

__all__ = ["Averaging", "train"]


@dataclass
class MeanAccumulator:
    """What one round has folded so far."""

    number: int
    updates: WeightedSum | Kept


def train(config: RunConfig, work: Work, steps: int, names: Container[str] | None = None) -> Answer:
    """Client: take so many local steps on its own texts; return how far they led.

    Args:
        config: of the run.
        work: what there is to do.
        steps: how many.
        names: what is trained; all by default.

    Raises:
        RunFailed: the loss is not finite.
    """
    trained = work.model.trainable()
    with only(trained, trained if names is None else names) as parameters:
        told, passes = take(config, work, parameters, steps)
    update = {
        name: after - work.tensors[name]
        for name, after in work.model.read().items()
        if names is None or name in names
    }
    return Answer(update, len(work.train), told, passes=passes)


class Averaging(Method):
    """One exchange a round; every reply is an update of all global tensors, or of those whose turn it is."""

    config: RunConfig
    blocks: Blocks | None = None

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect an update of every global tensor; of a group where groups take turns."""
        if self.blocks is None:
            return spec_of(tensors)
        names = self.blocks.of(tensors, exchange.arguments)
        return {name: one for name, one in spec_of(tensors).items() if name in names}

    def stride(self, tensors: Tensors) -> float | None:
        """Server: as long as local training makes an update."""
        return stride(self.config.training, tensors)

    def begin(self, state: State, round: int) -> MeanAccumulator:
        """Start a sum of updates."""
        return MeanAccumulator(round, sum_of(self.config, self.spec(self._exchange(state), state.tensors)))

    def plan(self, state: State, acc: MeanAccumulator) -> Exchange | Commit:
        """Ask for local training once; there is no setup."""
        return Commit() if acc.number == 0 or acc.updates.count else self._exchange(state)

    def _exchange(self, state: State) -> Exchange:
        return Exchange("fit") if self.blocks is None else self.blocks.exchange(state.version)

    def fold(self, acc: MeanAccumulator, kind: str, reply: Reply) -> MeanAccumulator:
        """Server: add one update, weighted by its number of texts."""
        acc.updates.add(reply.tensors, reply.examples)
        return acc

    def summed(self, acc: MeanAccumulator) -> WeightedSum | None:
        """Server: return the sum of updates, where they are summed."""
        return acc.updates if isinstance(acc.updates, WeightedSum) else None

    def step(self, state: State, acc: MeanAccumulator) -> Step:
        """Server: take the mean update."""
        if not acc.updates.count:
            return Step(state.tensors, state.memory)
        update = acc.updates.mean()
        if self.blocks is not None:
            return Step(self.blocks.step(state.tensors, state.version, update), state.memory)
        return Step({name: old + update[name] for name, old in state.tensors.items()}, state.memory)
