"""What noise costs and buys: the (epsilon, delta) of a run's releases, by the library ``dp-accounting``.

A release is a sum to which each client adds a vector of at most some length C, and the server Gaussian noise
of standard deviation ``noise`` C. Each client takes part with probability ``rate``, by coins of its own that
nobody else learns. Neighbours differ in one client that is there or not (add or remove one). Composition of
Poisson-subsampled Gaussians is by privacy loss distributions, an upper bound (Koskela et al., AISTATS 2020;
Doroshenko et al., PoPETs 2022); where all take part, k releases are exactly one of noise / sqrt(k) (Balle and
Wang, ICML 2018).

Where clients add discrete noise themselves (``discrete``), a release is (1 / 2 noise^2)-concentrated
differentially private (Canonne, Kamath and Steinke, NeurIPS 2020, theorem 4; of sums Kairouz, Liu and
Steinke, ICML 2021), these add up, and Renyi divergences of all orders give epsilon: a bound less tight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

from fedllm import extras

__all__ = ["LEAST", "epsilon_of", "least_noise", "usual_delta"]

LEAST = 0.1
"""Noise below which there is no privacy to speak of, and its accounting takes minutes."""
_GRID = 1e-3
"""Step at which privacy losses are discretised, upwards."""
_STEP, _SCALE = 1.4, 1e4


def usual_delta(members: int) -> float:
    """Return n^-1.1, below one in n: a mechanism that gives one of n away in clear has delta = 1/n.

    >>> round(usual_delta(100), 6)
    0.00631
    """
    return math.pow(members, -1.1)


def epsilon_of(
    releases: Mapping[int, int], rate: float, noise: float, delta: float, *, discrete: bool = False
) -> float:
    """Return the epsilon that releases have spent.

    Args:
        releases: how many rounds had so many releases each, by that number; those of one round share its
            coins, and are as one release of noise / sqrt(number).
        rate: probability with which a client takes part in a round, in (0, 1].
        noise: standard deviation over the length that bounds a client's vector.
        delta: in (0, 1).
        discrete: the noise is a sum of discrete Gaussians; then rate must be 1.

    Raises:
        ConfigError: ``dp-accounting`` is not installed.

    >>> epsilon_of({}, 1.0, 1.0, 1e-5)
    0.0
    >>> round(epsilon_of({1: 1}, 1.0, 1.0, 1e-5), 4)  # Balle and Wang's analytic Gaussian
    4.3772
    """
    return _epsilon(tuple(sorted(releases.items())), rate, noise, delta, discrete)


@cache
def _epsilon(
    releases: tuple[tuple[int, int], ...], rate: float, noise: float, delta: float, discrete: bool
) -> float:
    extras.require("dp_accounting", "privacy.noise_multiplier")
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, ZCDpEvent
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    total = sum(many * rounds for many, rounds in releases)
    if not total:
        return 0.0
    if discrete:
        assert rate == 1, "sampling is not accounted for here"
        renyi = RdpAccountant().compose(ZCDpEvent(total / (2 * noise**2)))
        return float(renyi.get_epsilon(delta))
    whole = float(get_epsilon_gaussian(noise / math.sqrt(total), delta))
    if rate >= 1:
        return whole
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, _GRID)
    for many, rounds in releases:
        event = GaussianDpEvent(noise / math.sqrt(many))
        accountant.compose(PoissonSampledDpEvent(rate, event), rounds)
    return min(whole, float(accountant.get_epsilon(delta)))


def least_noise(target: float, rounds: int, rate: float, delta: float, *, discrete: bool = False) -> float:
    """Return the least noise with which so many rounds spend at most ``target``, to four decimals.

    Args:
        target: epsilon.
        rounds: of one release each.
        rate: probability with which a client takes part in a round, in (0, 1].
        delta: in (0, 1).
        discrete: see :func:`epsilon_of`.

    Raises:
        ConfigError: ``dp-accounting`` is not installed.

    >>> noise = least_noise(3.0, 10, 1.0, 1e-5)
    >>> 2.97 < epsilon_of({1: 10}, 1.0, noise, 1e-5) <= 3.0
    True
    """
    extras.require("dp_accounting", "privacy.target_epsilon")
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian
    from scipy.optimize import brentq

    def above(noise: float) -> float:
        return epsilon_of({1: rounds}, rate, noise, delta, discrete=discrete) - target

    noise = float(get_sigma_gaussian(target, delta)) * math.sqrt(rounds)
    while discrete and above(noise) > 0:
        noise *= _STEP
    if rate < 1 or discrete:
        less = noise / _STEP
        while above(less) <= 0 and less > LEAST / _STEP:
            noise, less = less, less / _STEP
        if above(less) > 0:
            noise = float(brentq(above, less, noise, xtol=2e-4, rtol=1e-3))
    noise = max(_rounded_up(noise), LEAST)
    while above(noise) > 0:
        noise = _rounded_up(noise * 1.0005)
    return noise


def _rounded_up(noise: float) -> float:
    return math.ceil(noise * _SCALE) / _SCALE
