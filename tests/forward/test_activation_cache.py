"""Cached hidden states: the same slopes at a share of the cost, never stale."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from fedllm.models.evaluation import evaluate
from fedllm.models.network import Network
from strategies.base import Exchange
from strategies.forward.activations import ActivationCache, FeatureCache, stack_of
from strategies.forward.slopes import batch_loss, settled
from strategies.session import Session
from tests.architectures import Architecture
from tests.conformance.federation import ask, session_for, start
from tests.forward.test_fwdllm import P, session_with
from tests.parts import quick


@pytest.fixture
def session(tiny_encoder: Path, tiny_texts: Path) -> Session:
    return session_with(tiny_encoder, tiny_texts)


@pytest.mark.parametrize("targets", [(), ("layer.1.output.dense",)])
def test_resuming_gives_the_loss_of_the_whole_model(
    tiny_encoder: Path, tiny_texts: Path, targets: tuple[str, ...]
) -> None:
    session = session_with(tiny_encoder, tiny_texts)
    if not targets:
        for name, p in session.model.module.named_parameters():
            p.requires_grad_(name.startswith("head"))
    stack = stack_of(session.model.module)
    assert stack.frozen == (1 if targets else 2)
    train, _ = session.client_tokens(0)
    some = np.array([5, 1, 9, 3])
    loss = batch_loss(session.model, train.batch(some))
    values = {n: p.detach() for n, p in session.model.trainable().items()}
    entry, computed = ActivationCache(2**20).get(session.model, stack, train)
    assert computed == len(train)
    with settled(session.model.module):
        whole = loss(values)
        with stack.resumed(entry.batch(some)):
            resumed = loss(values)
        assert torch.equal(loss(values), whole)
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=1e-6)


def test_it_spares_the_frozen_layers(session: Session) -> None:
    stack = stack_of(session.model.module)
    entry, _ = ActivationCache(2**20).get(session.model, stack, session.client_tokens(0)[0])
    calls: list[int] = []
    table = session.model.module.backbone.get_input_embeddings()
    for module in (stack.layers[0].attention, table):
        module.register_forward_hook(lambda *_: calls.append(1))
    with settled(session.model.module), stack.resumed(entry.batch(np.arange(4))):
        session.model.forward(session.client_tokens(0)[0].batch(np.arange(4)))
    assert not calls
    session.model.forward(session.client_tokens(0)[0].batch(np.arange(4)))
    assert calls == [1, 1]


ENCODERS = (
    "AlbertModel", "BertModel", "DistilBertModel", "ElectraModel", "MPNetModel", "MambaForCausalLM",
    "ModernBertModel", "RobertaModel",
)  # fmt: skip


@pytest.mark.parametrize("name", quick(ENCODERS, "ElectraModel", "BertModel"))
def test_models_of_every_shape_are_resumed(architecture: Architecture, name: str, tiny_texts: Path) -> None:
    """Also those whose embeddings are narrower than their layers."""
    session = session_for(architecture(name), tiny_texts, "fwdllm", tuning={"peft": "head", "targets": ()})
    train, _ = session.client_tokens(0)
    some = np.arange(6)
    loss = batch_loss(session.model, train.batch(some))
    values = {n: p.detach() + 0.1 for n, p in session.model.trainable().items()}
    shortcut = ActivationCache(2**20).open(session.model, train)
    with settled(session.model.module):
        whole = loss(values)
        with shortcut.resumed(some):
            resumed = loss(values)
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=1e-6)


def test_files_hold_what_memory_would(session: Session) -> None:
    stack, train = stack_of(session.model.module), session.client_tokens(1)[0]
    memory, files = ActivationCache(2**30), ActivationCache(0)
    one, two = (cache.get(session.model, stack, train)[0] for cache in (memory, files))
    assert isinstance(two.rows, np.memmap)
    assert not isinstance(one.rows, np.memmap)
    some = np.array([7, 0, 2])
    assert torch.equal(one.batch(some), two.batch(some))


def test_a_second_call_computes_nothing_and_other_texts_have_their_own(session: Session) -> None:
    cache, stack = ActivationCache(2**20), stack_of(session.model.module)
    for node in (0, 1):
        train, _ = session.client_tokens(node)
        assert cache.get(session.model, stack, train)[1] == len(train)
        assert cache.get(session.model, stack, train)[1] == 0


def test_changed_frozen_weights_are_noticed(session: Session) -> None:
    cache, stack, train = ActivationCache(2**20), stack_of(session.model.module), session.client_tokens(0)[0]
    before, _ = cache.get(session.model, stack, train)
    session.method.load(session.model, start(session).tensors)  # trained tensors do not matter
    assert cache.get(session.model, stack, train)[1] == 0
    with torch.no_grad():
        next(iter(stack.layers[0].parameters())).add_(0.1)
    after, computed = cache.get(session.model, stack, train)
    assert computed == len(train)
    assert not np.array_equal(before.rows, after.rows)


def test_passes_are_counted_pro_rata(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_with(tiny_encoder, tiny_texts, parallel=P)
    state = start(session)
    ask(session, state, Exchange("fit"), 0, 1)
    assert ask(session, state, Exchange("fit"), 0, 2).passes.forward == pytest.approx((P + 1) / 2)
    low = session_with(tiny_encoder, tiny_texts, top=False, estimator="antithetic")
    assert ask(low, start(low), Exchange("fit"), 0, 2).passes.forward == 2 * P


def test_switched_off_it_gives_the_same_slopes_at_the_full_price(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    on, off = (session_with(tiny_encoder, tiny_texts, cache=cache) for cache in (True, False))
    cached, whole = (ask(session, start(session), Exchange("fit"), 0, 1) for session in (on, off))
    torch.testing.assert_close(cached.tensors["slopes"], whole.tensors["slopes"], rtol=1e-4, atol=1e-6)
    assert whole.passes.forward == P + 1


def test_what_could_reach_the_lowest_layer_rules_caching_out(tiny_encoder: Path, tiny_texts: Path) -> None:
    session = session_with(tiny_encoder, tiny_texts)
    session.model.module.backbone.get_input_embeddings().weight.requires_grad_(True)
    assert stack_of(session.model.module).frozen == 0


def test_the_server_scores_again_without_the_frozen_layers_and_to_the_same_bits(session: Session) -> None:
    """Also after a step, where only what lies above the frozen layers has changed."""
    method, model, test = session.method, session.model, session.test_tokens
    calls: list[int] = []
    handle = stack_of(model.module).layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    method.score(model, test)
    assert calls
    for tensors in (session.initial, {name: t + 0.1 for name, t in session.initial.items()}):
        method.load(model, tensors)
        calls.clear()
        again = method.score(model, test)
        assert not calls
        assert again == evaluate(model, test, session.config.evaluation.batch_size)
    handle.remove()


def test_the_server_notices_changed_frozen_weights_and_keeps_to_its_budget(session: Session) -> None:
    model, test = session.model, session.test_tokens
    before = session.method.score(model, test)
    with torch.no_grad():
        stack_of(model.module).layers[0].output.dense.weight.mul_(3.0)
    after = session.method.score(model, test)
    assert after == evaluate(model, test, session.config.evaluation.batch_size) != before
    none = FeatureCache(0)
    for _ in range(2):
        assert after == evaluate(model, test, 64, partial(none.around, model))


def test_layers_that_hand_on_more_than_hidden_states_are_not_cached(session: Session) -> None:
    """DeBERTa's return a pair; a run on it scores and measures as if there were no cache."""
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    network = Network(
        DebertaV2Model(config).requires_grad_(False), "mean", torch.nn.Linear(32, 3), session.task
    )
    model = dataclasses.replace(session.model, module=network.eval())
    train, _ = session.client_tokens(0)
    assert stack_of(network).frozen == 2
    shortcut = ActivationCache(2**20).open(model, train)
    assert (shortcut.entry, shortcut.computed, shortcut.stack.share) == (None, 0, 1.0)
    features = FeatureCache(2**20)
    plain = evaluate(model, train, 64)
    for _ in range(2):
        assert evaluate(model, train, 64, partial(features.around, model)) == plain
