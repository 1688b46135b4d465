"""When a round has enough directions: the gate by itself, on halves of known signal and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedllm.errors import ConfigError
from strategies.fwdllm.pacing import Gate, half_variance, signal_to_noise, stretch


def test_the_ratio_estimates_signal_over_the_means_variance_and_has_no_units() -> None:
    """Halves are g plus independent noise of known size, so the ratio is known."""
    generator = np.random.default_rng(0)
    g = generator.normal(size=20_000)
    a, b = (g + 3 * generator.normal(size=g.size) for _ in range(2))
    ratio = signal_to_noise(a, b)
    assert ratio == pytest.approx(1 / (9 / 2), rel=0.1)
    assert signal_to_noise(1000 * a, 1000 * b) == pytest.approx(ratio)


def test_halves_that_agree_have_no_noise() -> None:
    g = np.arange(3.0)
    assert signal_to_noise(g, g) == np.inf
    assert half_variance(g, g) == 0.0


def test_the_papers_rule_estimates_the_variance_of_a_half_and_carries_units() -> None:
    """Two means with variance s^2 differ by 2 s^2 in the mean square."""
    generator = np.random.default_rng(1)
    a, b = (5.0 + 3 * generator.normal(size=20_000) for _ in range(2))
    assert half_variance(a, b) == pytest.approx(9.0, rel=0.05)
    assert half_variance(10 * a, 10 * b) == pytest.approx(100 * half_variance(a, b))


@pytest.mark.parametrize(
    ("rule", "good", "bad"), [("ratio", 0.5, 0.49), ("variance", 0.5, 0.51)], ids=["ratio", "variance"]
)
def test_the_gate_opens_at_its_threshold(rule: str, good: float, bad: float) -> None:
    gate = Gate(rule, 0.5, 4)  # type: ignore[arg-type]
    assert gate.passes(good)
    assert not gate.passes(bad)


@pytest.mark.parametrize(("rule", "exchanges"), [("fixed", 1), ("ratio", 3), ("variance", 3)])
def test_the_cap_is_the_last_exchange(rule: str, exchanges: int) -> None:
    gate = Gate(rule, 0.5, 3)  # type: ignore[arg-type]
    assert [gate.exhausted(n) for n in range(exchanges)] == [False] * exchanges
    assert gate.exhausted(exchanges)


def test_the_literal_rule_looks_at_one_tensor_and_the_ratio_at_all() -> None:
    a, b = np.zeros(10), np.zeros(10)
    a[:5] = 3.0  # the halves disagree outside the tensor only
    a[5:], b[5:] = 1.0, 1.0
    part = stretch({"x": torch.zeros(5), "y": torch.zeros(5)}, "y")
    assert Gate("variance", 0.1, 4).measure(a, b, part) == 0.0
    assert Gate("ratio", 0.1, 4).measure(a, b, part) == pytest.approx(5 / (45 / 4))


def test_a_tensor_is_found_in_name_order_and_a_wrong_name_is_explained() -> None:
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros(4), "c": torch.zeros(1)}
    flat = np.concatenate([np.full(tensors[n].numel(), ord(n)) for n in sorted(tensors)])
    assert set(flat[stretch(tensors, "b")]) == {ord("b")}
    assert set(flat[stretch(tensors, "")]) == {ord("c")}
    with pytest.raises(ConfigError, match="'z' is no trained tensor"):
        stretch(tensors, "z")
