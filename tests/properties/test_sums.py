"""Fixed-point sums against exact fractions: any replies, in any order."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedllm.errors import RejectedReply
from fedllm.sums import LARGEST, WeightedSum, weighted_mean
from fedllm.tensors import TensorSpec

SPEC = {"a": TensorSpec((3,)), "b": TensorSpec((), torch.float64)}

values = st.one_of(
    st.floats(-4.0, 4.0, width=32),
    st.floats(-(2.0**127), 2.0**127, width=32),
    st.sampled_from([0.0, 2.0**-37, -(2.0**24), 2.0**25, 2.0**26, 3e7, 6.7e7, 1e12, 2.0**59, 2.0**61]),
)
weights = st.one_of(st.integers(1, 10_000), st.integers(1, 2**32))
replies = st.lists(st.tuples(st.lists(values, min_size=4, max_size=4), weights), max_size=5)


def tensors(four: list[float]) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(four[:3]), "b": torch.tensor(four[3], dtype=torch.float64)}


def add(total: WeightedSum, four: list[float], weight: int) -> bool:
    try:
        total.add(tensors(four), weight)
    except RejectedReply:
        return False
    return True


def bits(total: WeightedSum) -> bytes:
    found = [total.total(), total.mean()] if total.count else [total.total()]
    return b"".join(tensor.numpy().tobytes() for part in found for tensor in part.values())


@given(replies)
@example([([3e7, 0.0, 0.0, 0.0], 1), ([3e7, 0.0, 0.0, 0.0], 1), ([1e7, 0.0, 0.0, 0.0], 1)])
@settings(max_examples=50, deadline=None)
def test_the_order_of_replies_decides_neither_who_counts_nor_any_bit(
    given: list[tuple[list[float], int]],
) -> None:
    outcomes = set()
    for order in itertools.islice(itertools.permutations(range(len(given))), 24):
        total = WeightedSum(SPEC)
        taken = {number for number in order if add(total, *given[number])}
        outcomes.add((frozenset(taken), bits(total)))
    assert len(outcomes) == 1


@given(replies)
@settings(max_examples=150, deadline=None)
def test_the_sum_is_the_exact_one_to_half_a_step_of_the_grid_a_reply(
    given: list[tuple[list[float], int]],
) -> None:
    total = WeightedSum(SPEC)
    taken = [reply for reply in given if add(total, *reply)]
    assert all((four, weight) in taken for four, weight in given if max(map(abs, four)) * weight < LARGEST)
    found = total.total()
    for place, got in enumerate([*found["a"].tolist(), float(found["b"])]):
        terms = [Fraction(float(torch.tensor(four[place]))) * weight for four, weight in taken]
        if place == 3:
            terms = [Fraction(four[place]) * weight for four, weight in taken]
        wanted = sum(terms, Fraction(0))
        # Half a step of the grid, or of float64's own, for each reply and for the sum.
        steps = sum((max(Fraction(1, 2**37), abs(term) / 2**53) for term in terms), abs(wanted) / 2**52)
        assert abs(Fraction(got) - wanted) <= steps


@pytest.mark.slow
def test_ten_thousand_honest_clients_of_ten_thousand_texts_all_count() -> None:
    total = WeightedSum({"w": TensorSpec((1,))})
    for client in range(10_000):
        total.add({"w": torch.tensor([2.0 + client % 3])}, 10_000)
    assert total.count == 10_000
    mean = sum(Fraction(2 + client % 3) for client in range(10_000)) / 10_000
    assert total.mean()["w"].item() == pytest.approx(float(mean), rel=1e-7)


def test_one_large_update_leaves_room_for_the_others() -> None:
    total = WeightedSum({"w": TensorSpec((2,))})
    total.add({"w": torch.tensor([1e18, 1.0])}, 1)
    for _ in range(1000):
        total.add({"w": torch.tensor([1e6, 1.0])}, 100)
    total.add({"w": torch.tensor([-1e18, 1.0])}, 1)
    assert total.total()["w"].tolist() == [1e11, 100_002.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, LARGEST])
def test_what_cannot_be_summed_is_refused_and_leaves_no_trace(value: float) -> None:
    total = WeightedSum({"w": TensorSpec((2,))})
    total.add({"w": torch.ones(2)}, 3)
    with pytest.raises(RejectedReply, match="too large to average"):
        total.add({"w": torch.tensor([1.0, value])}, 1)
    assert (total.count, total.weight, total.total()["w"].tolist()) == (1, 3, [3.0, 3.0])


def test_an_ordinary_sum_takes_eight_bytes_a_parameter_and_no_more() -> None:
    total = WeightedSum({"w": TensorSpec((1000,))})
    for _ in range(50):
        total.add({"w": torch.full((1000,), 0.01)}, 500)
    parts = [part for part in vars(total).values() if isinstance(part, dict)]
    assert sum(t.nbytes for part in parts for t in part.values() if isinstance(t, torch.Tensor)) == 8000


@given(st.lists(st.tuples(st.floats(-1e100, 1e100), st.integers(1, 2**32 - 1)), min_size=1, max_size=5))
@example([(1e100, 1), (1.0, 1), (-1e100, 1)])
@settings(max_examples=100, deadline=None)
def test_a_mean_of_metrics_is_the_exact_one_in_any_order(pairs: list[tuple[float, int]]) -> None:
    """Each product is rounded once, and the sum once: to 2^-53 of themselves."""
    found = {weighted_mean(order) for order in itertools.permutations(pairs)}
    assert len(found) == 1
    terms = [Fraction(number) * weight for number, weight in pairs]
    wanted = sum(terms, Fraction(0)) / sum(weight for _, weight in pairs)
    within = sum(map(abs, terms)) / sum(weight for _, weight in pairs) / 2**50
    assert abs(Fraction(found.pop()) - wanted) <= within + Fraction(1, 2**1070)
