"""Server optimisers against three rounds worked out by hand (Reddi et al., ICLR 2021, algorithm 2)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from fedllm.config import ServerConfig
from fedllm.runs import checkpoint
from fedllm.tensors import Tensors
from server.rounds.optimizers import advance
from server.rounds.state import ServerState
from strategies.base import State

UPDATES = (1.0, 0.5, -0.25)
RATE, BETA1, BETA2, EPSILON = 0.5, 0.8, 0.9, 0.01

# Moments after each of the updates above: m with beta1 = 0.8, v with beta2 = 0.9.
MOMENTUM = (1.0, 1.3, 0.79)  # 0.8 + 0.5; 1.04 - 0.25
FIRST = (0.2, 0.26, 0.158)  # 0.16 + 0.1; 0.208 - 0.05
SECOND = {
    "adam": (0.1, 0.115, 0.10975),  # 0.09 + 0.025; 0.1035 + 0.00625
    # v grows by 0.1 D^2 while v < D^2 (0 < 1, 0.1 < 0.25) and shrinks by it where not (0.125 > 0.0625).
    "yogi": (0.1, 0.125, 0.11875),
}
STEPS = {
    "sgd": [RATE * update for update in UPDATES],
    "momentum": [RATE * m for m in MOMENTUM],
    **{
        kind: [RATE * m / (math.sqrt(v) + EPSILON) for m, v in zip(FIRST, second, strict=True)]
        for kind, second in SECOND.items()
    },
}


@pytest.mark.parametrize("kind", STEPS)
def test_three_rounds_are_what_the_algorithm_says(kind: str) -> None:
    config = ServerConfig.model_validate(
        {"optimizer": kind, "learning_rate": RATE, "momentum": BETA1, "beta2": BETA2, "epsilon": EPSILON}
    )
    tensors, moments = {"w": torch.tensor([2.0, -3.0])}, Tensors()
    for update, step in zip(UPDATES, STEPS[kind], strict=True):
        # The second value gets the opposite update: everything but v is odd in it.
        proposed = {"w": tensors["w"] + torch.tensor([update, -update])}
        expected = tensors["w"] + torch.tensor([step, -step])
        tensors, moments = advance(config, tensors, proposed, moments)
        torch.testing.assert_close(tensors["w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", STEPS)
def test_an_anchor_draws_each_round_back_to_where_the_run_began(kind: str) -> None:
    """w - w0 after a step is (1 - a) of what it would be, of whatever optimiser's step."""
    config = ServerConfig.model_validate(
        {"optimizer": kind, "learning_rate": RATE, "momentum": BETA1, "beta2": BETA2, "epsilon": EPSILON}
        | {"anchor": 0.25}
    )
    start, moments, away = torch.tensor([2.0, -3.0]), Tensors(), 0.0
    tensors = {"w": start.clone()}
    for update, step in zip(UPDATES, STEPS[kind], strict=True):
        proposed = {"w": tensors["w"] + update}
        tensors, moments = advance(config, tensors, proposed, moments)
        away = 0.75 * (away + step)
        torch.testing.assert_close(tensors["w"], start + away, rtol=1e-5, atol=1e-6)


def test_plain_averaging_takes_the_mean_bit_for_bit() -> None:
    now, mean = {"w": torch.tensor([0.1])}, {"w": torch.tensor([0.3])}
    tensors, moments = advance(ServerConfig(), now, mean, {})
    assert torch.equal(tensors["w"], mean["w"])
    assert moments == {}


def test_what_stood_in_the_memory_of_all_is_given_to_its_owner(tmp_path: Path) -> None:
    """As checkpoints were before moments and residual had groups of their own."""
    values = {name: torch.tensor([float(number)]) for number, name in enumerate("wmrg")}
    memory = {"optimizer/m/w": values["m"], "down/w": values["r"], "guide": values["g"]}
    ServerState(State(3, {"w": values["w"]}, memory), completed=2).save(tmp_path)
    saved = checkpoint.load(tmp_path, 2)
    old = {name: group for name, group in saved.groups.items() if name not in ("moments", "residual")}
    found = ServerState.load(dataclasses.replace(saved, groups=old))
    assert found.moments == {"m/w": values["m"]}
    assert found.residual == {"w": values["r"]}
    assert found.current.memory == {"guide": values["g"]}
