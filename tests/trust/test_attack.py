"""Attacks of simulated clients: who attacks, what is trained and sent, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.node import NodeContext
from client.worker import answer
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.protocol import wire
from fedllm.protocol.wire import Instruction
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors, norm_of
from simulations.bench.attacks import compare
from strategies.attack import attackers, bent, poisoned
from strategies.session import Session
from tests.rounds.federation import configuration, run

UPDATE: Tensors = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}


def attacked(**attack: Any) -> RunConfig:
    return RunConfig.model_validate({"attack": attack})


@pytest.mark.parametrize(
    ("attack", "expected"),
    [({"kind": "sign_flip"}, -1.0), ({"kind": "scale", "factor": 7.0}, 7.0), ({"kind": "backdoor"}, 1.0)],
)
def test_an_update_is_turned_or_lengthened(attack: dict[str, Any], expected: float) -> None:
    sent = bent(attacked(**attack), UPDATE, 1, 0, 2)
    assert all(torch.equal(sent[name], expected * UPDATE[name]) for name in UPDATE)


def test_garbage_is_as_long_as_an_update_and_another_one_each_time() -> None:
    config = attacked(kind="garbage", factor=2.0)
    sent = [bent(config, UPDATE, round, 0, 2) for round in (1, 1, 2)]
    assert norm_of(sent[0]) == pytest.approx(10.0)
    assert torch.equal(sent[0]["a"], sent[1]["a"])
    assert not torch.equal(sent[0]["a"], sent[2]["a"])


def test_so_many_attack_and_the_seed_says_who() -> None:
    config = attacked(kind="sign_flip", share=0.35)
    assert len(attackers(config)) == 3
    others = {attackers(config.model_copy(update={"seed": seed})) for seed in range(5)}
    assert len(others) > 1


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"attack": {"share": 0.5}}, "attack.share says how to attack"),
        ({"attack": {"kind": "sign_flip", "share": 0.01}}, "of 10 clients is none"),
        ({"attack": {"kind": "scale"}}, "sends honest updates"),
    ],
)
def test_an_attack_that_would_not_take_place_is_refused(sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RunConfig.validated(sections)


def test_neither_a_deployment_nor_a_device_attacks(tmp_path: Path) -> None:
    config = attacked(kind="sign_flip")
    with pytest.raises(ConfigError, match="is for fedllm simulate"):
        config.placed(deployed=True)
    place = NodeContext(0, "", str(tmp_path), str(tmp_path), keep_replies=True)
    asked = wire.pack_instruction(Instruction("run", "fit", 1))
    assert "this is a device" in wire.failure_of(answer(asked, config.to_json(), place))


def test_the_trigger_and_the_target_class_get_into_half_of_the_texts(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    attack = {"kind": "backdoor", "trigger": "zz", "target": 1, "share": 0.5}
    config = configuration(tiny_encoder, tiny_texts, attack=attack)
    session = Session(config)
    train, _ = session.client_tokens(0)
    found = poisoned(config, session.model, train)
    trigger = session.model.tokenizer("zz", add_special_tokens=False)["input_ids"]
    assert train.labels is not None
    assert found.labels is not None
    for row in range(len(train)):
        was, now = (t.flat[t.starts[row] : t.starts[row] + t.lengths[row]].tolist() for t in (train, found))
        if row % 2:
            assert (was, train.labels[row]) == (now, found.labels[row])
        else:
            assert now[1 : 1 + len(trigger)] == trigger
            assert (now[0], now[-1], found.labels[row]) == (was[0], was[-1], 1)
            assert len(now) <= config.data.max_length
    flipped = poisoned(
        config.model_copy(update={"attack": attacked(kind="label_flip").attack}), session.model, train
    )
    np.testing.assert_array_equal(flipped.labels, len(session.model.labels) - 1 - train.labels)
    with pytest.raises(ConfigError, match="for texts of one class"):
        poisoned(config, session.model, replace(train, labels=None))


@pytest.mark.slow
def test_a_backdoor_gets_in_and_its_success_is_measured_each_round(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    attack = {"kind": "backdoor", "trigger": "zz", "target": 1, "share": 0.5, "factor": 3.0}
    sections = {
        "rounds": 4,
        "server": {"norm_ratio": 0.0},
        "training": {"local_steps": 8, "learning_rate": 5e-2},
    }
    run(configuration(tiny_encoder, tiny_texts, attack=attack, **sections), tmp_path / "attacked")
    success = [record.metrics["backdoor_success"] for record in Run(tmp_path / "attacked").rounds()]
    assert max(success[1:]) > 0.9
    run(configuration(tiny_encoder, tiny_texts, **sections), tmp_path / "honest")
    assert "backdoor_success" not in Run(tmp_path / "honest").rounds()[-1].metrics


@pytest.mark.slow
def test_the_benchmark_sets_attacks_against_averages(tiny_encoder: Path, tiny_texts: Path) -> None:
    training = {"local_steps": 4, "batch_size": 8, "learning_rate": 5e-2}
    session = Session(
        configuration(tiny_encoder, tiny_texts, clients=10, rounds=3, training=training, server={})
    )
    found = compare(session, ["none", "sign_flip", "backdoor"], ["none", "median"])
    assert found["none"]["none"]["accuracy"] > found["sign_flip"]["none"]["accuracy"]
    assert found["none"]["median"] != found["none"]["none"]
    assert {name for name, cells in found.items() if "backdoor_success" in cells["none"]} == {"backdoor"}
