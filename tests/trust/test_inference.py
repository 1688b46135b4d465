"""The attack on membership that budgets are measured by: it finds what is there, and no more than that."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn import functional

from simulations.bench import privacy
from simulations.bench.privacy import Shadows, attacked, clipped_sum, sureness, trained


@pytest.mark.parametrize("gap", [0.0, 1.0, 3.0])
def test_of_two_normal_distributions_it_finds_what_can_be_found(gap: float) -> None:
    """Those that lie d deviations apart are told apart with advantage 2 F(d / 2) - 1, whatever the means."""
    random = np.random.default_rng(1)
    had = random.random((400, 300)) < 0.5
    sure = 2.0 * random.normal(size=had.shape) + 2.0 * gap * had + 50 * random.normal(size=300)
    found = attacked(sure, had)
    assert found["advantage"] == pytest.approx(2 * scipy.stats.norm.cdf(gap / 2) - 1, abs=0.02)
    at = scipy.stats.norm.sf(scipy.stats.norm.isf(0.01) - gap)
    assert found["found_at_1_percent"] == pytest.approx(at, abs=0.015)
    assert found["advantage_of_a_threshold"] < 0.1  # texts that are easy for all hide who was trained on them


def test_its_gradients_are_those_of_the_loss_clipped_text_by_text() -> None:
    random = torch.Generator().manual_seed(0)
    inputs, head = torch.randn(9, 4, generator=random), torch.randn(4, 3, generator=random)
    labels, expected = torch.randint(3, (9,), generator=random), torch.zeros(4, 3)
    there = torch.tensor([[True] * 6 + [False] * 3])
    for text in range(6):
        values = head.clone().requires_grad_()
        loss = functional.cross_entropy(inputs[text] @ values, labels[text])
        (gradient,) = torch.autograd.grad(loss, values)
        expected += gradient * min(1.0, 0.7 / float(gradient.norm()))
    found = clipped_sum(head[None], inputs, functional.one_hot(labels, 3).float(), there, 0.7)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


def test_how_sure_a_run_is_of_a_text() -> None:
    inputs, head = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 0.0, -1.0], [0.5, 0.0, 1.0]]])
    p = torch.softmax(torch.tensor([2.0, 0.0, 1.0]), 0)[1].item()
    assert sureness(head, inputs, torch.tensor([1]))[0, 0] == pytest.approx(math.log(p / (1 - p)), rel=1e-6)


def test_noise_takes_the_attack_what_it_sees() -> None:
    """Forty texts of random labels in forty dimensions are learnt by heart, unless noise is in the way."""
    random = torch.Generator().manual_seed(0)
    inputs = functional.normalize(torch.randn(40, 40, generator=random))
    labels = torch.arange(40) % 4
    had = np.random.default_rng(0).random((64, 40)) < 0.5
    how = Shadows(runs=64, clients=4)
    found = [
        attacked(sureness(trained(how, inputs, labels, had, noise), inputs, labels), had)
        for noise in (0.0, 2.0, 20.0)
    ]
    assert found[0]["advantage"] > 0.9
    assert found[0]["advantage"] > found[1]["advantage"] + 0.2 > found[2]["advantage"] + 0.2
    assert found[2]["advantage"] < 0.1
    assert privacy.advantage(np.ones(3), np.ones(3)) == 0
