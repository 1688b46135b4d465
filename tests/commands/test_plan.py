"""``fedllm plan``: what ways to train take is counted without weights, and the choice follows from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ModelError
from fedllm.models import model as models
from fedllm.tensors import dense_bytes
from simulations import planner
from simulations.plan_table import bits_per_second, limits
from simulations.planner import WAYS, Estimate, Limits, estimate, plan
from simulations.shapes import peak_bytes, without_weights
from strategies.base import Exchange
from strategies.blocks import groups
from strategies.registry import open_method, resolve_run
from tests.commands.conftest import Fedllm

ANYWHERE = Limits(None, None, lambda flops: flops / 1e9, 0)


def of(encoder: Path, **settings: object) -> RunConfig:
    given = {"model.name": encoder, "data.max_length": 12, "training.batch_size": 4, **settings}
    return resolve_run({}, [f"{key}={value}" for key, value in given.items()])


def test_a_chain_holds_what_its_way_back_needs() -> None:
    """x, W1 x, the slope along W1 x and dW2, then dW1 in the place of W1 x; the loss and its slope."""
    first, second = (nn.Linear(64, 64, bias=False, device="meta") for _ in range(2))

    def step() -> None:
        second(first(torch.ones(64, 64))).sum().backward()

    assert peak_bytes([first, second], step) == 4 * (64 * 64 * 4) + 2 * 4


def test_shapes_alone_are_the_loaded_model(tiny_encoder: Path) -> None:
    config, labels = of(tiny_encoder), ("a", "b")
    with without_weights():
        shapes = models.load(config, labels)
    loaded = models.load(config, labels)
    assert {p.device.type for p in shapes.module.parameters()} == {"meta"}
    told = [
        {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in one.module.named_parameters()}
        for one in (shapes, loaded)
    ]
    assert told[0] == told[1]


def test_bytes_are_those_of_the_methods_updates(tiny_encoder: Path) -> None:
    config = of(tiny_encoder)
    found = estimate("lora", config, ANYWHERE)
    method = open_method(config)
    spec = method.spec(Exchange("fit"), method.build(("a", "b")).read())
    assert found.up == found.down == dense_bytes(spec) + planner.HEADERS
    packed = estimate("lora", of(tiny_encoder, **{"codec.up": "quantize(bits=8)"}), ANYWHERE)
    assert found.up / 4 < packed.up < found.up / 2


@pytest.mark.slow
def test_a_turn_takes_gradients_moments_and_bytes_of_its_group_alone(tiny_encoder: Path) -> None:
    whole, half = (
        estimate("full", of(tiny_encoder, method="fedavg", **more), ANYWHERE)
        for more in ({}, {"tuning.blocks": 2})
    )
    method = open_method(of(tiny_encoder, method="fedavg"))
    tensors = method.build(("a", "b")).read()
    lower = groups(tensors, 2)[0]
    bytes_of = {name: 4 * tensor.numel() for name, tensor in tensors.items()}
    assert whole.up - planner.HEADERS == sum(bytes_of.values())
    assert half.up - planner.HEADERS == half.down - planner.HEADERS == sum(bytes_of[name] for name in lower)
    # Of each value that is left alone two moments, and a gradient if the peak is at the end of the way back.
    left = sum(size for name, size in bytes_of.items() if name not in lower)
    assert 2 * left <= whole.step - half.step <= 3 * left


@pytest.mark.slow
def test_memory_grows_with_texts_and_shrinks_with_recomputing(tiny_causal: Path) -> None:
    causal = {"model.task": "causal", "data.max_length": 64, "tuning.targets": '["q_proj"]'}

    def step(**more: object) -> int:
        return estimate("lora", of(tiny_causal, **causal, **more), ANYWHERE).step - planner.BESIDE[True]

    plain = step()
    assert step(**{"training.batch_size": 8}) == pytest.approx(2 * plain, rel=0.05)
    assert step(**{"training.memory": "lean"}) <= step(**{"training.memory": "checkpoint"}) < plain


def test_what_a_run_would_refuse_is_no_way(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "WAYS", {"mezo": WAYS["mezo"]})
    made = plan(of(tiny_encoder, **{"codec.up": "error_feedback(quantize(bits=8))"}), ANYWHERE)
    assert made.chosen is None
    assert "codec.up" in made.estimates[0].refused


def test_exact_gradients_come_first_and_then_the_shortest_round() -> None:
    slopes = Estimate("mezo", {}, total=1, round=1.0, fits=True)
    slow = Estimate("lora, lean", {}, exact=True, total=2, round=9.0, fits=True)
    quick = Estimate("lora", {}, exact=True, total=3, round=5.0, fits=True)

    def chosen(*found: Estimate) -> str | None:
        return planner._choice(found, ANYWHERE)[0]

    assert chosen(slopes, slow, quick) == "lora"
    assert chosen(slopes, slow, replace(quick, fits=False)) == "lora, lean"
    assert chosen(slopes, replace(slow, fits=False)) == "mezo"
    nothing, why = planner._choice([replace(slopes, fits=False), replace(slow, fits=False)], ANYWHERE)
    assert nothing is None
    assert why.startswith("nothing fits: mezo takes least")


def test_a_profile_is_its_slowest_device(tiny_encoder: Path) -> None:
    device = limits(of(tiny_encoder), None, None, "raspberry-pi")
    assert device.memory == 3e9  # a Pi 4's
    assert device.computes(57.6e9 * 0.41) == pytest.approx(1.0)
    assert device.link == (20e6, 100e6)
    given = limits(of(tiny_encoder), "1GiB", "2Mbit/s", "raspberry-pi")
    assert (given.memory, given.link) == (2**30, (2e6, 2e6))
    with pytest.raises(ConfigError, match=r"'moon', which is neither a profile nor a device") as refused:
        limits(of(tiny_encoder), None, None, "moon")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("rate", ["fast", "0Mbit/s", "1MB/s"])
def test_a_rate_is_in_bits(rate: str) -> None:
    with pytest.raises(ConfigError, match="is no rate; write 1Mbit/s"):
        bits_per_second(rate)


def test_a_model_that_is_not_there_is_no_refusal_of_a_way() -> None:
    with pytest.raises(ModelError, match=r"model\.name = 'nothere'"):
        plan(of(Path("nothere")), ANYWHERE)


def test_tasks_with_other_batches_are_refused(tiny_encoder: Path) -> None:
    with pytest.raises(ConfigError, match=r'not of model.task = "span"'):
        plan(of(tiny_encoder, **{"model.task": "span"}), ANYWHERE)


@pytest.mark.slow
def test_the_command_says_every_way(fedllm: Fedllm, tiny_encoder: Path) -> None:
    words = ["plan", "--model", tiny_encoder, "--memory", "2GiB", "--uplink", "1Mbit/s"]
    answer = fedllm(*words, "--set", "data.max_length=12", "--json")
    assert answer.code == 0, answer.err
    made: dict[str, Any] = json.loads(answer.out)
    assert [one["way"] for one in made["ways"]] == list(WAYS)
    refused = {one["way"]: one["refused"] for one in made["ways"] if one["refused"]}
    assert refused.keys() == {"full, thirds"}
    assert "tuning.blocks = 3 groups cannot be made of 2 layers" in refused["full, thirds"]
    assert made["chosen"].startswith("lora")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is asked for")
@pytest.mark.parametrize(("way", "case"), [("lora, lean", "lean_backprop"), ("mezo", "chunked_antithetic")])
def test_a_real_step_takes_what_was_counted(way: str, case: str) -> None:
    shape = {"data.max_length": 128, "training.batch_size": 4, "tuning.targets": '["q_proj", "v_proj"]'}
    # The benchmark takes no step: it has no moments.
    config = of(Path("smollm2"), **{"model.task": "causal", "training.optimizer": "sgd", **shape})
    counted = estimate(way, planner._as(config, WAYS[way]), ANYWHERE)
    done = subprocess.run(
        [sys.executable, "-m", "simulations.bench.memory", case],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert counted.model == measured["model_bytes"]
    assert counted.step == pytest.approx(measured["peak_bytes"], rel=planner.SPREAD[way])
