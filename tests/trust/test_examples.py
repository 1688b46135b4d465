"""Differential privacy of single texts: gradients clipped one by one, noise, batches, spending."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

from client import secret
from client.node import NodeContext
from client.spending import Spending
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, FedllmError, StoreError
from fedllm.protocol.wire import Instruction
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors
from strategies import private, steps
from strategies.base import StepNoise, Work
from strategies.registry import resolve_run
from strategies.session import Session
from tests.parts import quick
from tests.rounds.federation import configuration, cut, run

EXAMPLE = {"unit": "example", "clip": 0.3, "noise_multiplier": 1.5, "delta": 1e-3}


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


@pytest.fixture(scope="module")
def session(tiny_encoder: Path, tiny_texts: Path) -> Session:
    return Session(configuration(tiny_encoder, tiny_texts, privacy=EXAMPLE))


def work_of(session: Session, noise: float = 1.5, number: int = 1) -> Work:
    session.method.load(session.model, session.initial)
    train, test = session.client_tokens(0)
    told = StepNoise(noise, key(number))
    return Work("fit", {}, 1, 0, 0, 0.0, session.model, session.initial, {}, train, test, told)


def made(session: Session, work: Work, step: int = 0) -> Tensors:
    """Return the gradient of one private step."""
    parameters = session.model.trainable()
    steps._Private(session.config, work, parameters)(step)
    found = {name: one.grad.clone() for name, one in parameters.items() if one.grad is not None}
    for one in parameters.values():
        one.grad = None
    assert found.keys() == parameters.keys()
    return found


def silent(key: bytes, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float64)


def each_by_hooks(session: Session, work: Work) -> Tensors:
    """Return the gradients of all texts [text, ...] from one pass over them together.

    A linear layer's gradient for text n is the sum over tokens of (what comes back) x (what went in), as
    Goodfellow (2015) has it.
    """
    module, found = session.model.module, dict[str, torch.Tensor]()
    went: dict[str, torch.Tensor] = {}
    hooks = []

    def forward(name: str) -> Any:
        def hook(_: Any, given: tuple[torch.Tensor], made: torch.Tensor) -> None:
            went[name] = given[0].detach()
            made.register_hook(lambda back: backward(name, back))

        return hook

    def backward(name: str, back: torch.Tensor) -> None:
        into = went[name].reshape(len(back), -1, went[name].shape[-1])
        back = back.reshape(len(back), -1, back.shape[-1])
        found[f"{name}.weight"] = torch.einsum("nto,nti->noi", back, into)
        found[f"{name}.bias"] = back.sum(1)

    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.requires_grad:
            hooks.append(layer.register_forward_hook(forward(name)))
    batch = work.train.whole()
    (session.model.loss(batch) * len(work.train)).backward()
    for hook in hooks:
        hook.remove()
    parameters = session.model.trainable()
    for one in parameters.values():
        one.grad = None
    return {name: found[name] for name in parameters}


def test_gradients_are_those_of_each_text_by_itself(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All texts are in the batch; half of them are longer than the clip."""
    monkeypatch.setattr(private, "gaussian", silent)
    monkeypatch.setattr(steps, "batch_rate", lambda config, texts: 1.0)
    work = work_of(session)
    each = each_by_hooks(session, work)
    norms = torch.stack([one.flatten(1).square().sum(1) for one in each.values()]).sum(0).sqrt()
    clip = float(norms.median())
    privacy = session.config.privacy.model_copy(update={"clip": clip})
    found = made(_with(session, session.config.model_copy(update={"privacy": privacy})), work)
    scale = torch.clamp(clip / norms, max=1.0)
    for name, one in each.items():
        expected = torch.einsum("n,n...->...", scale, one) / session.config.training.batch_size
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # at the lowest trained layers
def test_gradients_are_those_of_opacus(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its GradSampleModule and DPOptimizer without noise, on all of a client's texts at once."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    monkeypatch.setattr(private, "gaussian", silent)
    monkeypatch.setattr(steps, "batch_rate", lambda config, texts: 1.0)
    work = work_of(session)
    found = made(session, work)
    wrapped = GradSampleModule(session.model.module, strict=False)
    try:
        session.model.loss(work.train.whole()).backward()
        parameters = session.model.trainable()
        theirs = DPOptimizer(
            torch.optim.SGD(parameters.values()),
            noise_multiplier=0.0,
            max_grad_norm=EXAMPLE["clip"],
            expected_batch_size=session.config.training.batch_size,
        )
        theirs.pre_step()
        expected = {name: one.grad.clone() for name, one in parameters.items() if one.grad is not None}
    finally:
        wrapped.to_standard_module()
        for one in session.model.trainable().values():
            one.grad = None
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-7)


def _with(session: Session, config: RunConfig) -> Session:
    other = Session(config)
    other.__dict__["_built"] = session._built
    return other


def test_noise_has_the_deviation_of_the_closed_form(session: Session) -> None:
    """Of many steps: (z C / B)^2 around the sum over the batch; here of no text, as none is drawn."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps, "batch_rate", lambda config, texts: 0.0)
        drawn = [
            torch.cat([one.flatten() for one in made(session, work_of(session, number=n)).values()])
            for n in range(40)
        ]
    values = torch.stack(drawn).double()
    expected = 1.5 * 0.3 / session.config.training.batch_size
    assert float(values.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * values.numel()))
    assert abs(float(values.mean())) < 5 * expected / math.sqrt(values.numel())


def test_texts_are_drawn_by_coins_of_the_secret(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of(session)
    texts = len(work.train.texts())
    steps_of = {n: steps._Private(session.config, work_of(session, number=n), {}) for n in (1, 2)}
    drawn = {n: [len(list(one._drawn(step))) for step in range(400)] for n, one in steps_of.items()}
    rate = 8 / texts
    assert rate < 1
    assert abs(np.mean(drawn[1]) - 8) < 5 * math.sqrt(texts * rate * (1 - rate) / 400)
    assert drawn[1] != drawn[2]
    assert drawn[1] == [len(list(steps_of[1]._drawn(step))) for step in range(400)]


def test_a_step_without_noise_of_its_own_is_none(session: Session) -> None:
    with pytest.raises(RuntimeError, match="nobody gave this client's steps their noise"):
        steps.take(session.config, replace(work_of(session), noise=None), session.model.trainable(), 1)


def asked(round: int, digest: int = 7) -> Instruction:
    return Instruction("run", "fit", round=round, digest=digest)


def place_of(folder: Path) -> NodeContext:
    return NodeContext(0, "", str(folder), str(folder), keep_replies=False)


def test_spending_is_that_of_the_steps_taken(session: Session, tmp_path: Path) -> None:
    """Against Renyi differential privacy (Mironov et al., 2019), which bounds a little less tightly."""
    config, train = session.config, session.client_tokens(0)[0]
    texts, place = len(train.texts()), place_of(tmp_path)
    opened = Spending.of(config, place, "run", texts)
    assert opened.epsilon(config) == 0.0
    for round in (1, 2):
        opened.spend(config, place, asked(round), train)
    again = Spending.of(config, place, "run", texts)
    key = again.spend(config, place, asked(2), train).key
    assert again.epsilon(config) == opened.epsilon(config)
    event = SelfComposedDpEvent(PoissonSampledDpEvent(8 / texts, GaussianDpEvent(1.5)), 2 * 2)
    renyi = RdpAccountant().compose(event).get_epsilon(1e-3)
    assert 0.7 * renyi < opened.epsilon(config) <= renyi
    other = again.spend(config, place, asked(2, digest=8), train).key
    assert other != key
    assert again.epsilon(config) > opened.epsilon(config)
    assert (tmp_path / "run" / "spending.json").stat().st_mode & 0o777 == 0o600


def test_texts_that_change_have_noise_of_their_own_and_others_are_refused(
    session: Session, tmp_path: Path
) -> None:
    config, train = session.config, session.client_tokens(0)[0]
    texts, place = len(train.texts()), place_of(tmp_path)
    opened = Spending.of(config, place, "run", texts)
    changed = replace(train, flat=train.flat[::-1].copy())
    assert (
        opened.spend(config, place, asked(1), train).key != opened.spend(config, place, asked(1), changed).key
    )
    with pytest.raises(StoreError, match=f"with {texts} texts and has {texts + 1}"):
        Spending.of(config, place, "run", texts + 1)


def test_a_budget_becomes_noise_and_is_kept_to(session: Session, tmp_path: Path) -> None:
    privacy = session.config.privacy.model_copy(update={"noise_multiplier": None, "target_epsilon": 2.0})
    config = session.config.model_copy(update={"privacy": privacy, "rounds": 3})
    train, place = session.client_tokens(0)[0], place_of(tmp_path)
    opened = Spending.of(config, place, "run", len(train.texts()))
    for round in (1, 2, 3):
        opened.spend(config, place, asked(round), train)
    assert 1.97 < opened.epsilon(config) <= 2.0
    with pytest.raises(FedllmError, match=r"above privacy\.target_epsilon = 2"):
        opened.spend(config, place, asked(4), train)
    assert "4/0" not in json.loads((tmp_path / "run" / "spending.json").read_text())["released"]


def test_one_text_alone_needs_a_delta(session: Session, tmp_path: Path) -> None:
    privacy = session.config.privacy.model_copy(update={"noise_multiplier": None, "target_epsilon": 2.0})
    config = session.config.model_copy(update={"privacy": privacy.model_copy(update={"delta": None})})
    with pytest.raises(ConfigError, match="has one text"):
        Spending.of(config, place_of(tmp_path), "run", 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", quick(["lora", "fedavg"], "lora"))
def test_a_run_that_is_killed_ends_with_the_same_bits_and_tells_what_it_spent(
    method: str, tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret, "token_bytes", bytes)
    config = configuration(tiny_encoder, tiny_texts, rounds=2, method=method, privacy=EXAMPLE, server={})
    whole = run(config, tmp_path / "whole")
    cut(config, tmp_path / "run", 2)
    again = run(config, tmp_path / "run")
    assert again["state_sha256"] == whole["state_sha256"]
    assert again["privacy"] == whole["privacy"]
    ledgers = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("clients/*/*/spending.json")]
    assert len(ledgers) == 6
    assert all(len(marks) == 1 for one in ledgers for marks in one["released"].values())
    fewest = min(one["texts"] for one in ledgers)
    event = SelfComposedDpEvent(PoissonSampledDpEvent(8 / fewest, GaussianDpEvent(1.5)), 2 * 2)
    assert 0.7 < again["privacy"]["epsilon"] / RdpAccountant().compose(event).get_epsilon(1e-3) <= 1
    records = Run(tmp_path / "run").rounds()
    assert 0 == records[0].epsilon < records[1].epsilon < records[2].epsilon
    assert not {"loss", "epsilon"} & records[-1].details.keys()


@pytest.mark.slow
def test_under_secure_aggregation_only_the_sum_of_noised_updates_is_seen(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret, "token_bytes", bytes)
    found = []
    for name, more in {"plain": {}, "secure": {"secure_aggregation": True, "threshold": 0.5}}.items():
        config = configuration(
            tiny_encoder, tiny_texts, rounds=1, privacy={**EXAMPLE, **more}, server={"quorum": 3}
        )
        found.append(run(config, tmp_path / name))
    assert found[0]["state_sha256"] == found[1]["state_sha256"]
    assert found[0]["privacy"] == found[1]["privacy"]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"privacy": {"unit": "example", "clip": 1.0}}, "needs privacy.noise_multiplier or"),
        ({"privacy": {"unit": "example", "noise_multiplier": 1.0}}, r"needs privacy\.clip"),
        ({"privacy": {**EXAMPLE, "clip_quantile": 0.5}}, "clips gradients"),
        ({"server": {"mode": "async", "buffer": 2}}, 'server.mode is "async"'),
        ({"evaluation": {"clients": True}, "data": {"client_test_fraction": 0.2}}, "what clients score"),
        ({"training": {"class_weights": "balanced"}}, "by class"),
        ({"model": {"prune": "2:4"}, "method": "fedavg"}, "masks as well"),
        ({"method": "fedkd"}, 'method = "fedkd" learns from texts in other ways'),
        ({"method": "fwdllm"}, 'method = "fwdllm" learns'),
        ({"method": "fednova", "training": {"optimizer": "sgd"}}, 'method = "fednova" learns'),
        ({"lora": {"rule": "fed-sb"}}, r'lora\.rule = "fed-sb" learns'),
    ],
)
def test_what_noise_on_steps_does_not_cover_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_run({"privacy": EXAMPLE, "method": "lora", **sections})


@pytest.mark.slow
def test_more_rounds_than_the_noise_was_made_for_are_refused(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    privacy = {"unit": "example", "clip": 0.3, "target_epsilon": 5.0}
    config = configuration(tiny_encoder, tiny_texts, rounds=1, privacy=privacy)
    summary = run(config, tmp_path / "run")
    assert 4.9 < summary["privacy"]["epsilon"] <= 5.0
    with pytest.raises(ConfigError, match="begin another run"), Run(tmp_path / "run").extended(2) as more:
        run(more, tmp_path / "run")
