"""Groups of layers that take turns: a round trains, sends and takes up one, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, WireError
from fedllm.models.training import minibatches
from fedllm.randomness import stream
from fedllm.tensors import dense_bytes
from strategies.base import Exchange, Replay
from strategies.blocks import Blocks, groups
from strategies.registry import open_method, resolve_run
from strategies.session import Session
from tests.conformance.federation import ask, commit, federate, reply_of, session_for, start

SGD = {"optimizer": "sgd", "local_steps": 2, "batch_size": 4, "learning_rate": 0.1, "schedule": "constant"}


@pytest.fixture(scope="module")
def session(tiny_encoder: Path, tiny_texts: Path) -> Session:
    return session_for(tiny_encoder, tiny_texts, method="fedavg", tuning={"blocks": 2}, training=SGD)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_layers_stand_from_the_embeddings_up_and_an_encoder_before_its_decoder() -> None:
    names = [f"{side}.block.{layer}.w" for side in ("decoder", "encoder") for layer in (10, 2)]
    found = groups([*names, "shared.weight", "final_norm.weight", "lm_head.weight"], 4)
    assert [sorted(group) for group in found] == [
        ["encoder.block.2.w", "shared.weight"],
        ["encoder.block.10.w"],
        ["decoder.block.2.w"],
        ["decoder.block.10.w", "final_norm.weight", "lm_head.weight"],
    ]


@pytest.mark.parametrize("head", ["head.weight", "backbone.classifier.dense.weight", "model.score.weight"])
def test_a_new_head_is_trained_in_every_round(head: str) -> None:
    assert all(head in group for group in groups(["h.0.w", "h.1.w", head], 2))


def test_groups_are_as_equal_as_can_be_and_no_more_than_layers() -> None:
    names = [f"h.{layer}.w" for layer in range(7)]
    assert [len(group) for group in groups(names, 3)] == [2, 3, 2]
    with pytest.raises(ConfigError, match=r"tuning.blocks = 8 groups cannot be made of 7 layers"):
        groups(names, 8)


@pytest.mark.parametrize("order", ["up", "down", "random"])
def test_each_group_has_one_turn_before_any_has_another(order: Any) -> None:
    names = [f"h.{layer}.w" for layer in range(5)]
    blocks = Blocks(5, order, seed=3)
    turns = [blocks.of(dict.fromkeys(names), blocks.exchange(version).arguments) for version in range(20)]
    layers = [int(next(iter(turn))[2]) for turn in turns]
    assert all(sorted(layers[k : k + 5]) == [0, 1, 2, 3, 4] for k in range(0, 20, 5))
    if order != "random":
        assert layers == 4 * ([0, 1, 2, 3, 4] if order == "up" else [4, 3, 2, 1, 0])
    else:
        assert len({tuple(layers[k : k + 5]) for k in range(0, 20, 5)}) > 1


def test_only_the_group_whose_turn_it_is_moves_and_travels(session: Session) -> None:
    first = start(session)
    second = federate(session, first, 1, (0, 1))
    third = federate(session, second, 1, (0, 1), first=2)
    names = groups(first.tensors, 2)
    assert changed(first.tensors, second.tensors) <= names[0]
    assert changed(second.tensors, third.tensors) <= names[1]
    assert any("layer.0." in name for name in changed(first.tensors, second.tensors))
    assert any("layer.1." in name for name in changed(second.tensors, third.tensors))
    for state, group in ((first, names[0]), (second, names[1])):
        exchange = session.method.plan(state, session.method.begin(state, 1))
        assert isinstance(exchange, Exchange)
        spec = session.method.spec(exchange, state.tensors)
        assert spec.keys() == group
        assert dense_bytes(spec) == sum(4 * state.tensors[name].numel() for name in group)


def test_a_clients_turn_is_plain_sgd_on_the_group(session: Session) -> None:
    """The same steps by autograd alone, for one client; what has no turn gets no gradient."""
    state = start(session)
    exchange = session.method.plan(state, session.method.begin(state, 1))
    assert isinstance(exchange, Exchange)
    answer = ask(session, state, exchange, 1)
    model, group = session.model, groups(state.tensors, 2)[0]
    session.method.load(model, state.tensors)
    model.module.train()
    parameters = model.trainable()
    batches = minibatches(session.client_tokens(1)[0], 4, 2, stream(session.config.seed, "batches", 1, 1))
    for batch in batches:
        slopes = torch.autograd.grad(model.loss(batch), [parameters[name] for name in sorted(group)])
        with torch.no_grad():
            for name, slope in zip(sorted(group), slopes, strict=True):
                parameters[name] -= 0.1 * slope
    for name in group:
        moved = parameters[name].detach() - state.tensors[name]
        torch.testing.assert_close(answer.tensors[name], moved, rtol=1e-5, atol=1e-7)
    after = commit(session, state, 1, "fit", [reply_of(answer, 1)])
    for name in group:
        torch.testing.assert_close(after.tensors[name], parameters[name].detach(), rtol=1e-5, atol=1e-6)


def test_a_step_is_a_record_of_the_group_alone(session: Session) -> None:
    blocks = Blocks(2, "up", 0)
    tensors = {"h.0.w": torch.ones(3), "h.1.w": torch.zeros(2)}
    step = blocks.step(tensors, 1, {"h.1.w": torch.full((2,), 0.5)})
    assert isinstance(step, Replay)
    assert len(step.record) == 1 + 4 * 2
    after = blocks.replay(tensors, step.record)
    assert after["h.1.w"].tolist() == [0.5, 0.5]
    assert after["h.0.w"] is tensors["h.0.w"]
    for record in (b"", b"\x02" + step.record[1:], step.record[:-1]):
        with pytest.raises(WireError):
            blocks.replay(tensors, record)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["codec.down=quantize(bits=8)"], 'codec.down must be "none"'),
        (["codec.up=error_feedback(sign)"], "leave error feedback out"),
        (["server.optimizer=adam"], 'leave server.optimizer at "sgd"'),
        (["server.anchor=0.1"], "server.anchor at 0"),
        (["lora.rule=svd"], "use rule fedit or ffa"),
        (["method=fedkd"], "tuning.blocks is for other methods"),
        (["method=fwdllm"], "tuning.blocks is for other methods"),
        (["privacy.secure_aggregation=true"], "secure_aggregation"),
    ],
)
def test_what_cannot_go_with_turns_is_refused(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        open_method(resolve_run({}, ["tuning.blocks=2", *settings]))


@pytest.mark.parametrize("method", ["fedkd", "fwdllm", "mezo", "scaffold", "fednova"])
def test_a_file_with_turns_is_refused_under_a_method_that_takes_none(method: str) -> None:
    with pytest.raises(ConfigError, match=f'method = "{method}" trains all layers in every round'):
        resolve_run({"tuning": {"blocks": 2}}, [f"method={method}"])


def test_an_order_without_turns_has_no_effect() -> None:
    with pytest.raises(ConfigError, match=r"tuning\.block_order is for tuning\.blocks above 1"):
        resolve_run({}, ["tuning.block_order=down"])
    assert RunConfig().tuning.blocks == 1
