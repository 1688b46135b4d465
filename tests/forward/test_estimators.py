"""Estimators against backpropagation, which the library itself never calls here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fedllm.tensors import Tensors, fingerprint
from strategies.forward.directions import Direction, Kind, combine, flat
from strategies.forward.slopes import Loss, antithetic, expected_cosine, jvp, passes, settled
from tests.parts import quick


def encoder(dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.num_labels = 3
    model = BertForSequenceClassification(config)
    with torch.no_grad():  # far enough from the tiny default start that slopes are not all near 0
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def decoder() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def setting(model: nn.Module, wanted: str) -> tuple[Loss, Tensors]:
    """A loss over the parameters whose names contain ``wanted``, on a padded batch."""
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    if isinstance(model, LlamaForCausalLM):
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.tensor([0, 1, 2, 1])
    kwargs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    tensors: Tensors = {n: p for n, p in model.named_parameters() if wanted in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tensors)

    def loss(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        value: torch.Tensor = torch.func.functional_call(model, dict(values), kwargs=kwargs).loss
        return value

    return loss, tensors


def gradient(loss: Loss, tensors: Tensors) -> np.ndarray:
    """The oracle: reverse mode, flattened in name order."""
    grads = torch.autograd.grad(loss(tensors), [tensors[n] for n in sorted(tensors)])
    return torch.cat([g.reshape(-1) for g in grads]).double().numpy()


MODELS = [pytest.param(encoder, "layer.1", id="encoder"), pytest.param(decoder, "layers.1", id="decoder")]


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize(("make", "wanted"), MODELS)
def test_jvp_is_the_projection_of_the_gradient(
    make: Callable[[], nn.Module], wanted: str, parallel: int, kind: Kind
) -> None:
    model = make()
    loss, tensors = setting(model, wanted)
    model.eval()
    truth = gradient(loss, tensors)
    names = [Direction(0, 1, 2, i) for i in range(7)]
    with settled(model):
        got = jvp(loss, tensors, names, kind=kind, parallel=parallel)
    want = np.array([flat(v, len(truth), kind) @ truth for v in names])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(np.linalg.norm(truth)))


@pytest.mark.parametrize(("make", "wanted"), MODELS)
def test_antithetic_at_its_radius_is_close_to_the_projection(
    make: Callable[[], nn.Module], wanted: str
) -> None:
    model = make()
    loss, tensors = setting(model, wanted)
    model.eval()
    truth = gradient(loss, tensors)
    names = [Direction(0, 1, 0, i) for i in range(8)]
    with settled(model):
        got = antithetic(loss, tensors, names)
    want = np.array([flat(v, len(truth)) @ truth for v in names])
    assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_antithetic_error_falls_with_the_square_of_the_step() -> None:
    """On a cubic the error is known: h^2 times the sum of the entries' cubes (in float64: no rounding)."""
    w = {"w": torch.linspace(1.0, 2.0, 10, dtype=torch.float64)}
    v = flat(Direction(0, 1, 0, 0), 10).astype(np.float64)
    truth = float((3 * w["w"].numpy() ** 2) @ v)
    norm = float(w["w"].norm())
    for radius in (0.2, 0.1):
        got = antithetic(lambda t: (t["w"] ** 3).sum().double(), w, [Direction(0, 1, 0, 0)], radius=radius)
        h = radius * norm / math.sqrt(10)
        assert got[0] - truth == pytest.approx(h**2 * (v**3).sum(), rel=1e-2)


def test_radius_is_the_relative_length_of_the_step() -> None:
    w = {"a": torch.full((4,), 3.0), "b": torch.full((5,), -2.0)}
    seen: list[float] = []

    def loss(t: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen.append(math.sqrt(float(((t["a"] - 3) ** 2).sum() + ((t["b"] + 2) ** 2).sum())))
        return t["a"].sum()

    antithetic(loss, w, [Direction(0, 1, 0, 0)], radius=0.05)
    assert seen == pytest.approx([0.05 * math.sqrt(4 * 9 + 5 * 4)] * 2, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_forward_gradient_is_unbiased(kind: Kind) -> None:
    """The mean over many directions reaches the gradient, at the rate 1 / sqrt(N)."""
    g = torch.linspace(-1, 1, 12)
    names = [Direction(0, 1, 0, i) for i in range(4000)]
    c = jvp(lambda t: (g * t["w"]).sum(), {"w": torch.zeros(12)}, names, kind=kind, parallel=500)
    mean = combine({v: float(x) / len(names) for v, x in zip(names, c, strict=True)}, 12, kind)
    standard_error = float(g.norm()) / math.sqrt(len(names))
    assert np.abs(mean - g.numpy()).max() < 5 * standard_error


@pytest.mark.parametrize("count", quick([50, 200, 800], 200))
def test_cosine_to_the_gradient(count: int) -> None:
    """Mean over ten rounds, since a single cosine at N = 50 scatters by 14 % of itself."""
    p, cosines = 4000, []
    g = torch.randn(p, generator=torch.Generator().manual_seed(0))
    for round in range(10):
        names = [Direction(0, round, i % 10, i // 10) for i in range(count)]
        c = jvp(lambda t: (g * t["w"]).sum(), {"w": torch.zeros(p)}, names, parallel=50)
        mean = combine({v: float(x) for v, x in zip(names, c, strict=True)}, p)
        cosines.append(float(mean @ g.numpy() / np.linalg.norm(mean) / g.norm()))
    assert np.mean(cosines) == pytest.approx(math.sqrt(count / p), rel=0.2)
    assert np.mean(cosines) == pytest.approx(expected_cosine(count, p), rel=0.05)


@pytest.mark.slow
def test_weights_are_bit_identical_after_10_000_probes() -> None:
    torch.manual_seed(0)
    w = {"a": torch.randn(37) * 10.0 ** torch.randint(-6, 6, (37,)), "b": torch.randn(3, 5)}
    before = fingerprint(w)
    antithetic(lambda t: t["a"].sum() * t["b"].mean(), w, [Direction(0, 1, 0, i) for i in range(5000)])
    assert fingerprint(w) == before


def test_weights_are_restored_when_the_loss_raises() -> None:
    w = {"a": torch.randn(37)}
    before = fingerprint(w)

    def loss(_: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        antithetic(loss, w, [Direction(0, 1, 0, 0)])
    assert fingerprint(w) == before


@pytest.mark.parametrize("estimator", [jvp, antithetic])
def test_dropout_is_off_inside_and_back_afterwards(estimator: Callable[..., np.ndarray]) -> None:
    model = encoder(dropout=0.5)
    model.train()
    model.dropout.eval()
    modes = [part.training for part in model.modules()]
    loss, tensors = setting(model, "layer.1")
    names = [Direction(0, 1, 0, i) for i in range(3)]
    with settled(model):
        first, second = estimator(loss, tensors, names), estimator(loss, tensors, names)
    assert np.array_equal(first, second)
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("estimator", [jvp, antithetic])
def test_autograd_records_no_graph(estimator: Callable[..., np.ndarray]) -> None:
    """Every loss that the estimators see is free of a graph, though its parameters ask for gradients."""
    model = encoder()
    inner, tensors = setting(model, "layer.1")
    recorded: list[bool] = []

    def loss(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        value = inner(values)
        recorded.append(value.requires_grad or value.grad_fn is not None)
        return value

    assert all(p.requires_grad for p in tensors.values())
    with settled(model):
        estimator(loss, tensors, [Direction(0, 1, 0, i) for i in range(3)])
    assert recorded
    assert not any(recorded)
    assert all(p.grad is None for p in model.parameters())


def test_passes() -> None:
    assert passes(10, "antithetic", 8) == 20
    assert passes(10, "jvp", 8) == 12
    assert passes(8, "jvp", 8) == 9


def test_no_directions_have_no_slopes() -> None:
    tensors = {"a": torch.ones(3)}
    for found in (estimator(lambda w: w["a"].sum(), tensors, []) for estimator in (jvp, antithetic)):
        assert (found.shape, found.dtype) == ((0,), np.float32)
