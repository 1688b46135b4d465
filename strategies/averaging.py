"""The server's half of every method whose clients send updates that are averaged.

    server     w  <-  w + sum_k n_k (w_k - w) / sum_k n_k           n_k: client k's number of texts

(McMahan et al., AISTATS 2017, algorithm 1). The sum is exact whatever the order of replies.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.accumulator import WeightedSum
from fedllm.tensors import Spec, Tensors, spec_of
from strategies.base import Commit, Exchange, Method, Reply, State

__all__ = ["Averaging"]


@dataclass
class Round:
    """What one round has folded so far."""

    number: int
    updates: WeightedSum


class Averaging(Method):
    """One exchange a round; every reply is an update of all global tensors."""

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect an update of every global tensor."""
        return spec_of(tensors)

    def begin(self, state: State, round: int) -> Round:
        """Start a sum of updates."""
        return Round(round, WeightedSum(spec_of(state.tensors)))

    def plan(self, state: State, acc: Round) -> Exchange | Commit:
        """Ask for local training once; there is no setup."""
        return Commit() if acc.number == 0 or acc.updates.count else Exchange("fit")

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
