"""Cached hidden states: the same slopes at a share of the cost, never stale."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm import models
from fedllm.activation_cache import ActivationCache, Shelf, stack_of
from fedllm.forward import batch_loss, settled
from strategies.base import Exchange
from strategies.workshop import Workshop
from tests.conformance.federation import ask, start
from tests.forward.test_fwdllm import P, shop_with


@pytest.fixture
def shop(tiny_encoder: Path, tiny_texts: Path) -> Workshop:
    return shop_with(tiny_encoder, tiny_texts)


@pytest.mark.parametrize("targets", [(), ("layer.1.output.dense",)])
def test_resuming_gives_the_loss_of_the_whole_model(
    tiny_encoder: Path, tiny_texts: Path, targets: tuple[str, ...]
) -> None:
    shop = shop_with(tiny_encoder, tiny_texts)
    if not targets:
        for name, p in shop.model.module.named_parameters():
            p.requires_grad_(name.startswith("head"))
    stack = stack_of(shop.model.module)
    assert stack.frozen == (1 if targets else 2)
    train, _ = shop.client_tokens(0)
    some = np.array([5, 1, 9, 3])
    loss = batch_loss(shop.model, train.batch(some))
    values = {n: p.detach() for n, p in shop.model.trainable().items()}
    entry, computed = ActivationCache(2**20).get(shop.model, stack, train)
    assert computed == len(train)
    with settled(shop.model.module):
        whole = loss(values)
        with stack.resumed(entry.batch(some)):
            resumed = loss(values)
        assert torch.equal(loss(values), whole)
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=1e-6)


def test_it_spares_the_frozen_layers(shop: Workshop) -> None:
    stack = stack_of(shop.model.module)
    entry, _ = ActivationCache(2**20).get(shop.model, stack, shop.client_tokens(0)[0])
    calls: list[int] = []
    handle = stack.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    with settled(shop.model.module), stack.resumed(entry.batch(np.arange(4))):
        shop.model.forward(shop.client_tokens(0)[0].batch(np.arange(4)))
    handle.remove()
    assert not calls


def test_files_hold_what_memory_would(shop: Workshop) -> None:
    stack, train = stack_of(shop.model.module), shop.client_tokens(1)[0]
    memory, files = ActivationCache(2**30), ActivationCache(0)
    one, two = (cache.get(shop.model, stack, train)[0] for cache in (memory, files))
    assert isinstance(two.rows, np.memmap)
    assert not isinstance(one.rows, np.memmap)
    some = np.array([7, 0, 2])
    assert torch.equal(one.batch(some), two.batch(some))


def test_a_second_call_computes_nothing_and_other_texts_have_their_own(shop: Workshop) -> None:
    cache, stack = ActivationCache(2**20), stack_of(shop.model.module)
    for node in (0, 1):
        train, _ = shop.client_tokens(node)
        assert cache.get(shop.model, stack, train)[1] == len(train)
        assert cache.get(shop.model, stack, train)[1] == 0


def test_changed_frozen_weights_are_noticed(shop: Workshop) -> None:
    cache, stack, train = ActivationCache(2**20), stack_of(shop.model.module), shop.client_tokens(0)[0]
    before, _ = cache.get(shop.model, stack, train)
    shop.method.load(shop.model, start(shop).tensors)  # trained tensors do not matter
    assert cache.get(shop.model, stack, train)[1] == 0
    with torch.no_grad():
        next(iter(stack.layers[0].parameters())).add_(0.1)
    after, computed = cache.get(shop.model, stack, train)
    assert computed == len(train)
    assert not np.array_equal(before.rows, after.rows)


def test_passes_are_counted_pro_rata(tiny_encoder: Path, tiny_texts: Path) -> None:
    shop = shop_with(tiny_encoder, tiny_texts, parallel=P)
    state = start(shop)
    ask(shop, state, Exchange("fit"), 0, 1)
    assert ask(shop, state, Exchange("fit"), 0, 2).passes.forward == pytest.approx((P + 1) / 2)
    low = shop_with(tiny_encoder, tiny_texts, top=False, estimator="antithetic")
    assert ask(low, start(low), Exchange("fit"), 0, 2).passes.forward == 2 * P


def test_switched_off_it_gives_the_same_slopes_at_the_full_price(
    tiny_encoder: Path, tiny_texts: Path
) -> None:
    on, off = (shop_with(tiny_encoder, tiny_texts, cache=cache) for cache in (True, False))
    cached, whole = (ask(shop, start(shop), Exchange("fit"), 0, 1) for shop in (on, off))
    torch.testing.assert_close(cached.tensors["slopes"], whole.tensors["slopes"], rtol=1e-4, atol=1e-6)
    assert whole.passes.forward == P + 1


def test_what_could_reach_the_lowest_layer_rules_caching_out(tiny_encoder: Path, tiny_texts: Path) -> None:
    shop = shop_with(tiny_encoder, tiny_texts)
    shop.model.module.backbone.get_input_embeddings().weight.requires_grad_(True)
    assert stack_of(shop.model.module).frozen == 0


def test_the_server_scores_again_without_the_frozen_layers_and_to_the_same_bits(shop: Workshop) -> None:
    """Also after a step, where only what lies above the frozen layers has changed."""
    method, model, test = shop.method, shop.model, shop.test_tokens
    calls: list[int] = []
    handle = stack_of(model.module).layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    method.score(model, test)
    assert calls
    for tensors in (shop.initial, {name: t + 0.1 for name, t in shop.initial.items()}):
        method.load(model, tensors)
        calls.clear()
        again = method.score(model, test)
        assert not calls
        assert again == models.evaluate(model, test, shop.config.evaluation.batch_size)
    handle.remove()


def test_the_server_notices_changed_frozen_weights_and_keeps_to_its_budget(shop: Workshop) -> None:
    model, test = shop.model, shop.test_tokens
    before = shop.method.score(model, test)
    with torch.no_grad():
        stack_of(model.module).layers[0].output.dense.weight.mul_(3.0)
    after = shop.method.score(model, test)
    assert after == models.evaluate(model, test, shop.config.evaluation.batch_size) != before
    none = Shelf(0)
    for _ in range(2):
        assert after == models.evaluate(model, test, 64, partial(none.around, model))
