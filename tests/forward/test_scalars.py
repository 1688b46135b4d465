"""A cohort's slopes on the wire and what is rebuilt from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import WireError
from strategies.forward.cohort import Cohort, gradient, halves, pack_cohort, unpack_cohort
from strategies.forward.directions import Direction, flat

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
COHORTS = st.dictionaries(
    st.integers(0, 2**32 - 1),
    st.tuples(st.lists(FLOATS, max_size=5), st.integers(1, 2**32 - 1)),
    max_size=5,
)


def cohort_of(clients: dict[int, tuple[list[float], int]], round: int = 3) -> Cohort:
    cohort = Cohort(round)
    for node, (slopes, examples) in clients.items():
        cohort.extend(node, np.array(slopes, dtype=np.float32), examples)
    return cohort


@settings(max_examples=50, deadline=None)
@given(COHORTS, st.integers(0, 2**32 - 1))
def test_packing_is_invertible(clients: dict[int, tuple[list[float], int]], round: int) -> None:
    cohort = cohort_of(clients, round)
    again = unpack_cohort(pack_cohort(cohort))
    assert (again.round, again.examples) == (cohort.round, cohort.examples)
    assert {n: s.tolist() for n, s in again.slopes.items()} == {
        n: s.tolist() for n, s in cohort.slopes.items()
    }
    assert pack_cohort(again) == pack_cohort(cohort)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_record_or_refused(data: bytes) -> None:
    try:
        cohort = unpack_cohort(data)
    except WireError:
        return
    numbered = 2 * sum(len(indices) for indices in cohort.indices.values())
    assert len(cohort.slopes) * 10 + 4 * cohort.directions + numbered + 9 == len(data)


def test_every_cut_is_refused() -> None:
    record = pack_cohort(cohort_of({1: ([1.0, 2.0], 7), 9: ([3.0], 5)}))
    for cut in (*range(len(record)), None):
        with pytest.raises(WireError):
            unpack_cohort(record[:cut] if cut is not None else record + b"\0")


def test_chosen_directions_travel_by_number_and_one_chosen_twice_counts_twice() -> None:
    cohort = Cohort(3)
    cohort.extend(4, np.array([1.0, -2.0, 0.5], dtype=np.float32), 30, np.array([7, 7, 65_535]))
    cohort.extend(4, np.array([3.0], dtype=np.float32), 30, np.array([70]))
    record = pack_cohort(cohort)
    assert len(record) == 9 + 10 + 6 * 4
    again = unpack_cohort(record)
    assert again.numbers(4).tolist() == [7, 7, 65_535, 70]
    naive = sum(
        c * flat(Direction(8, 3, 4, i), 50) / 4 for c, i in ((1.0, 7), (-2.0, 7), (0.5, 65_535), (3.0, 70))
    )
    np.testing.assert_allclose(gradient(again, 8, 50), naive, rtol=1e-9, atol=1e-12)
    for cut in range(len(record)):
        with pytest.raises(WireError):
            unpack_cohort(record[:cut])


def test_clients_are_averaged_by_texts_and_directions_evenly() -> None:
    cohort = cohort_of({4: ([1.0, -2.0], 30), 1: ([0.5], 10)})
    naive = 0.75 * (flat(Direction(8, 3, 4, 0), 50) - 2 * flat(Direction(8, 3, 4, 1), 50)) / 2
    naive = naive + 0.25 * 0.5 * flat(Direction(8, 3, 1, 0), 50)
    np.testing.assert_allclose(gradient(cohort, 8, 50), naive, rtol=1e-12)


def test_halves_share_no_direction_and_together_are_the_whole() -> None:
    cohort = cohort_of({4: ([1.0, -2.0, 0.5, 3.0], 30), 1: ([0.5, 1.0], 10)})
    a, b = halves(cohort, 8, 50)
    np.testing.assert_allclose((a + b) / 2, gradient(cohort, 8, 50), rtol=1e-9, atol=1e-12)
    other = cohort_of({4: ([7.0, -2.0, 0.5, 3.0], 30), 1: ([0.5, 1.0], 10)})
    c, d = halves(other, 8, 50)
    assert np.array_equal(a, c) != np.array_equal(b, d)


def test_single_directions_are_dealt_in_turn() -> None:
    cohort = cohort_of({n: ([1.0], 10) for n in range(4)})
    a, b = halves(cohort, 0, 20)
    np.testing.assert_allclose(a, (flat(Direction(0, 3, 0, 0), 20) + flat(Direction(0, 3, 2, 0), 20)) / 2)
    np.testing.assert_allclose(b, (flat(Direction(0, 3, 1, 0), 20) + flat(Direction(0, 3, 3, 0), 20)) / 2)
