"""Discriminative sampling: aligned candidates come more often, and the estimate stays unbiased."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.forward.directions import Direction, Kind, flat
from strategies.forward.vectors import flatten
from strategies.fwdllm.selection import alignments, choose, draw
from tests.forward.test_fwdllm import session_with


def names(count: int, round: int = 1) -> list[Direction]:
    return [Direction(0, round, 0, i) for i in range(count)]


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_alignments_are_inner_products_in_whole_numbers(kind: Kind) -> None:
    guide = np.random.default_rng(0).normal(size=500)
    found = alignments(guide, names(40), kind)
    assert found.dtype == np.int64
    want = np.array([flat(v, 500, kind) @ guide for v in names(40)])
    scale = float(found @ want) / float(want @ want)
    np.testing.assert_allclose(found / scale, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    assert np.array_equal(alignments(1000.0 * guide, names(40), kind), found)


def test_a_guide_of_zeros_leaves_all_alike() -> None:
    choice = choose(np.zeros(10), names(40), 8)
    assert len(set(choice.indices.tolist())) == 8
    np.testing.assert_array_equal(choice.weights, np.ones(8))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(1, 12))
def test_expected_counts_times_weights_are_even(sizes: list[int], count: int) -> None:
    """Each start stands for an equal share of all; the weight undoes the inclusion exactly."""
    choice = draw(np.array(sizes, dtype=np.int64), count, np.random.default_rng(len(sizes)))
    shares = [size + sum(sizes) // len(sizes) + 1 for size in sizes]
    for index, weight in zip(choice.indices, choice.weights, strict=True):
        inclusion = count * shares[index] / sum(shares)
        assert weight * inclusion == pytest.approx(count / len(sizes))
        assert 0 < weight <= 2 * (1 + len(sizes) / (sum(sizes) + 1)) + 1e-9


def test_counts_are_proportional_over_all_starts() -> None:
    """A generator that gives every start once: the mean count is the share itself."""

    class Counter(np.random.Generator):
        def __init__(self, value: int) -> None:
            super().__init__(np.random.PCG64(0))
            self.value = value

        def integers(self, total: int) -> int:  # type: ignore[override]
            return self.value % total

    sizes = np.array([0, 3, 1, 20, 7, 7], dtype=np.int64)
    shares = sizes + int(sizes.sum()) // 6 + 1
    total = int(shares.sum())
    counts = np.zeros(6)
    for start in range(total):
        for index in draw(sizes, 4, Counter(start)).indices:
            counts[index] += 1
    np.testing.assert_array_equal(counts, 4 * shares)


@pytest.mark.slow
def test_aligned_candidates_are_chosen_more_often() -> None:
    guide = np.random.default_rng(1).normal(size=64)
    chosen, passed = [], []
    for round in range(1, 60):
        pool = names(80, round)
        sizes = np.abs([flat(v, 64) @ guide for v in pool])
        picked = set(choose(guide, pool, 8).indices.tolist())
        chosen += [sizes[i] for i in picked]
        passed += [sizes[i] for i in range(80) if i not in picked]
    assert np.mean(chosen) > 1.2 * np.mean(passed)


@pytest.mark.slow
def test_the_estimate_is_unbiased_on_a_tiny_model(tiny_encoder: Path, tiny_texts: Path) -> None:
    """The mean over many rounds of choosing is backpropagation's gradient, within 3 standard errors."""
    session = session_with(tiny_encoder, tiny_texts)
    assert session.initial
    session.model.module.eval()
    parameters = session.model.trainable()
    loss = session.model.forward(session.test_tokens.batch(range(8))).loss
    assert loss is not None
    grads = torch.autograd.grad(loss, list(parameters.values()))
    truth = flatten(dict(zip(parameters, grads, strict=True)))
    noise = np.random.default_rng(2).normal(size=len(truth)) * np.linalg.norm(truth) / math.sqrt(len(truth))
    guide = truth + noise  # cosine about 0.7: the choice is far from even
    rounds, count = 1500, 4
    estimates = np.zeros((rounds, len(truth)))
    uneven = 0.0
    for round in range(rounds):
        pool = names(5 * count, round)
        choice = choose(guide, pool, count)
        uneven = max(uneven, float(np.ptp(choice.weights)))
        for index, weight in zip(choice.indices, choice.weights, strict=True):
            v = flat(pool[index], len(truth)).astype(np.float64)
            estimates[round] += weight * float(v @ truth) * v / count
    assert uneven > 0.5
    # Along the gradient, where the choice leans; and along every entry, in the mean square of the errors.
    along = estimates @ truth / float(truth @ truth)
    assert abs(along.mean() - 1.0) < 3 * along.std() / math.sqrt(rounds)
    errors = (estimates.mean(axis=0) - truth) / (estimates.std(axis=0) / math.sqrt(rounds))
    assert float((errors**2).mean()) == pytest.approx(1.0, abs=3 * math.sqrt(2 / len(truth)))
