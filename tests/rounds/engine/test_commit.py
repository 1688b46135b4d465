"""What ends a round: the step that was taken is the state that the next one begins from."""

from __future__ import annotations

from typing import Any

import torch

from fedllm.codecs import Codecs
from fedllm.config import RunConfig, ServerConfig
from server.rounds.commit import Committer
from server.rounds.exchange.downlink import Downlink
from server.rounds.state import ServerState
from strategies.base import State, Step


class Onwards:
    """A method whose rounds each add one to every value, and count themselves in its memory."""

    def step(self, state: State, acc: Any) -> Step:
        memory = {"rounds": torch.tensor([state.version + 1.0])}
        return Step({name: value + 1.0 for name, value in state.tensors.items()}, memory, {"seen": 2.0})


def test_moments_of_the_server_last_from_round_to_round() -> None:
    """Momentum 1/2 of steps of length 1 (FedAvgM): 1, then 1.5, then 1.75."""
    config = RunConfig(server=ServerConfig(optimizer="momentum", momentum=0.5))
    method: Any = Onwards()
    state = ServerState.begin({"w": torch.zeros(2)})
    downlink = Downlink(config, Codecs.of(config.codec).down, method)
    committer = Committer(config, method, downlink, state, None)
    told = [committer.commit(number, None, {}) for number in (1, 2, 3)]
    assert told == 3 * [{"seen": 2.0}]
    assert state.current.tensors["w"].tolist() == 2 * [1.0 + 1.5 + 1.75]
    assert (state.current.version, state.current.memory["rounds"].item()) == (3, 3.0)
