"""What noise costs: against closed forms, a figure of the literature, and the library's other accountant."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from fedllm.privacy.accounting import epsilon_of, least_noise, usual_delta
from tests.parts import quick


def gaussian_delta(epsilon: float, noise: float) -> float:
    """Balle and Wang (ICML 2018), theorem 8: the delta of one release at an epsilon."""
    a, b = 1 / (2 * noise), epsilon * noise
    return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b))


@pytest.mark.parametrize(("rounds", "noise"), [(1, 1.0), (10, 4.2), (100, 20.0)])
def test_where_all_take_part_it_is_the_analytic_gaussian(rounds: int, noise: float) -> None:
    epsilon = epsilon_of({1: rounds}, 1.0, noise, 1e-5)
    assert gaussian_delta(epsilon, noise / math.sqrt(rounds)) == pytest.approx(1e-5, rel=1e-6)


def test_the_moments_accountants_example_costs_no_more_than_it_says() -> None:
    """Abadi et al. (CCS 2016), section 3: q = 0.01, sigma = 4, 10,000 steps are (1.26, 1e-5)-private."""
    assert 0.9 < epsilon_of({1: 10_000}, 0.01, 4.0, 1e-5) <= 1.26


def test_it_is_below_renyis_bound_and_above_what_one_round_must_cost() -> None:
    import dp_accounting as library
    from dp_accounting.rdp import RdpAccountant

    renyi = RdpAccountant()
    renyi.compose(library.PoissonSampledDpEvent(0.1, library.GaussianDpEvent(1.0)), 10)
    found = epsilon_of({1: 10}, 0.1, 1.0, 1e-3)
    assert found < renyi.get_epsilon(1e-3) < 1.5 * found
    # One round, remove a client: delta(epsilon) of q N(1, z) + (1 - q) N(0, z), by integration of its tail.
    once = epsilon_of({1: 1}, 0.1, 1.0, 1e-3)
    at = 0.5 + math.log((math.exp(once) - 0.9) / 0.1)
    tail = 0.1 * norm.sf(at - 1) + 0.9 * norm.sf(at) - math.exp(once) * norm.sf(at)
    assert tail == pytest.approx(1e-3, rel=0.01)


def test_more_rounds_cost_more_and_more_noise_costs_less() -> None:
    by_rounds = [epsilon_of({1: rounds}, 0.1, 1.0, 1e-3) for rounds in (0, 1, 5, 20)]
    by_noise = [epsilon_of({1: 5}, 0.1, noise, 1e-3) for noise in (4.0, 2.0, 1.0)]
    by_rate = [epsilon_of({1: 5}, rate, 1.0, 1e-3) for rate in (0.01, 0.1, 0.5, 1.0)]
    for found in (by_rounds, by_noise, by_rate):
        assert found == sorted(found)


def test_two_releases_of_a_round_share_its_coins_and_cost_more_than_two_rounds() -> None:
    twice, apart = epsilon_of({1: 3, 2: 1}, 0.1, 1.0, 1e-3), epsilon_of({1: 5}, 0.1, 1.0, 1e-3)
    assert apart < twice < epsilon_of({1: 5}, 1.0, 1.0, 1e-3)
    assert epsilon_of({2: 3}, 1.0, 1.0, 1e-3) == pytest.approx(epsilon_of({1: 6}, 1.0, 1.0, 1e-3))


@pytest.mark.parametrize(
    ("target", "rounds", "rate", "delta"),
    quick(
        [(1.0, 10, 1.0, usual_delta(10)), (3.0, 10, 0.1, usual_delta(100)), (8.0, 20, 0.5, 1e-5)],
        (8.0, 20, 0.5, 1e-5),
    ),
)
def test_the_least_noise_spends_the_budget_within_a_hundredth(
    target: float, rounds: int, rate: float, delta: float
) -> None:
    noise = least_noise(target, rounds, rate, delta)
    assert 0.99 * target <= epsilon_of({1: rounds}, rate, noise, delta) <= target
