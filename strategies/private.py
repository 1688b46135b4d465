"""A sum under client-level differential privacy: fixed denominator, clients alike, noise added once.

    update  =  (sum over the round's clients of u_k  +  N(0, (z C)^2 I)) / m

(McMahan et al., ICLR 2018, the estimator of a fixed denominator): ||u_k|| <= C = ``privacy.clip`` is held by
:mod:`fedllm.protocol.uplink` on both sides, z is ``privacy.noise_multiplier``, and m = ``server.sample`` the
clients of a round on average. Whoever does not answer adds zero, so that dropouts change neither noise nor m.

The sum is an integer multiple of 2^-36, and so is the noise, rounded: what is published is a rounded Gaussian
around an exact sum, without the pattern that floating-point noise leaves in its low bits (Mironov, CCS 2012).

With ``privacy.clip_quantile`` C follows the updates' norms (Andrew et al., NeurIPS 2021, algorithm 1): beside
the sum a round releases how many updates were not longer than C, less half of those that came, with noise of
its own. Both are as private as one release of z, as z^-2 = z_sum^-2 + (2 z_count)^-2 (theorem 1 there).

Under secure aggregation clients add the noise, each a share of it, and the server sees the sum with the noise
in it (Kairouz, Liu and Steinke, ICML 2021; :mod:`fedllm.secagg.ring`). With q the fewest that may be summed:

    update  =  sum over the round's clients of (u_k + N_Z(0, (z C)^2 / q I)) / m
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch

from fedllm import extras
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.privacy.accounting import epsilon_of, least_noise, usual_delta
from fedllm.privacy.noise import gaussian
from fedllm.protocol.uplink import ROUNDING
from fedllm.secagg.rules import fewest
from fedllm.sums import WeightedSum
from fedllm.tensors import Spec, Tensors
from fedllm.wording import number
from strategies.robust import Kept, average

__all__ = [
    "FixedSum",
    "PrivateSum",
    "count_noise",
    "delta_of",
    "deviation",
    "next_clip",
    "plain_sum_of",
    "promise",
    "reach",
    "spent",
    "sum_of",
    "with_noise",
]

_UNIT = 2.0**-36
"""Of :class:`fedllm.sums.WeightedSum`."""


def delta_of(config: RunConfig) -> float:
    """Return the run's delta: as given, or n^-1.1 for n clients."""
    return config.privacy.delta or usual_delta(config.clients)


def spent(config: RunConfig, releases: Mapping[int, int]) -> float:
    """Return the epsilon of releases; see :func:`fedllm.privacy.accounting.epsilon_of`.

    Args:
        config: of a run with ``privacy.noise_multiplier``.
        releases: how many rounds released so many sums each, by that number.
    """
    assert config.privacy.noise_multiplier is not None
    told = _rate(config), config.privacy.noise_multiplier, delta_of(config)
    return epsilon_of(releases, *told, discrete=config.privacy.secure_aggregation)


def _rate(config: RunConfig) -> float:
    """Return the probability of taking part in a round, as far as it hides anything.

    Under secure aggregation the server, from whom clients hide, knows who takes part; and who is missing is
    taken to send zeros and noise, so that neighbours are runs in which one client's texts count for nothing.
    """
    return 1.0 if config.privacy.secure_aggregation else config.cohort / config.clients


def with_noise(config: RunConfig) -> RunConfig:
    """Return a run that has a budget and no noise with the least noise that keeps to it.

    Raises:
        ConfigError: ``dp-accounting`` is not installed, or the budget is less than one round spends.
    """
    privacy = config.privacy
    if not privacy.hides:
        return config
    extras.require("dp_accounting", "differential privacy (section privacy)")
    target, discrete = privacy.target_epsilon, privacy.secure_aggregation
    if target is None or privacy.hides == "example":  # for which each client sees to its own noise
        return config
    if privacy.noise_multiplier is None:
        noise = least_noise(target, config.rounds, _rate(config), delta_of(config), discrete=discrete)
        return config.model_copy(update={"privacy": privacy.model_copy(update={"noise_multiplier": noise})})
    if (first := spent(config, {1: 1})) > target:
        raise ConfigError(
            f"privacy.noise_multiplier = {privacy.noise_multiplier:g} spends epsilon = {number(first)} in a "
            f"round, more than privacy.target_epsilon = {target:g}: raise one of them, or leave out the noise"
        )
    return config


def promise(config: RunConfig) -> str:
    """Say what a differentially private run promises, and how."""
    if config.privacy.hides == "example":
        return _promise_to_texts(config)
    privacy, after = config.privacy, spent(config, {1: config.rounds})
    budget = privacy.target_epsilon
    said = f"epsilon = {number(after)} at delta = {delta_of(config):.3g} after {config.rounds} rounds"
    if budget is not None and after > budget:
        said = f"epsilon = {budget:g} at delta = {delta_of(config):.3g}, spent before round {config.rounds}"
    follows = "" if privacy.clip_quantile is None else f" at first, then {privacy.clip_quantile:g}-quantiles"
    if privacy.secure_aggregation:
        how = (
            f"clients add the noise, and the shares of {fewest(config)} of a round's {config.cohort} make it "
            "whole (server.quorum); the server knows who takes part, so that each is taken to do so in every "
            "round"
        )
    else:
        how = f"each of {config.clients} clients takes part with probability {_rate(config):g}"
    return (
        f"differential privacy of each client: {said}; noise_multiplier = {privacy.noise_multiplier:g}, "
        f"clip = {privacy.clip:g}{follows}; {how}; clients count alike, however many texts they have"
    )


def _promise_to_texts(config: RunConfig) -> str:
    privacy = config.privacy
    given = f"delta = {privacy.delta:.3g}" if privacy.delta else "delta = n^-1.1 of a client's n texts"
    noise = f"the least noise that keeps to it in {config.rounds * config.training.local_steps} steps"
    if privacy.noise_multiplier is not None:
        noise = f"noise_multiplier = {privacy.noise_multiplier:g}"
    budget = (
        "what each client tells" if privacy.target_epsilon is None else f"{privacy.target_epsilon:g} at most"
    )
    return (
        f"differential privacy of each text of a client: epsilon = {budget} at {given}; {noise}, clip = "
        f"{privacy.clip:g} for the gradient of a text; each of n texts is in a batch with probability "
        f"{config.training.batch_size} / n"
    )


def reach(clip: float, spec: Spec) -> float:
    """Return how far one client can move a sum: its clip, and what scaling and summing round.

    Args:
        clip: L2 norm to which updates are scaled down.
        spec: of an update.
    """
    values = sum(math.prod(tensor.shape) for tensor in spec.values())
    return clip * (1 + ROUNDING) + _UNIT / 2 * math.sqrt(values)


def sum_of(config: RunConfig, spec: Spec) -> WeightedSum | Kept:
    """Return what folds a round's updates: a private sum, a robust average, or the weighted mean.

    Args:
        config: the run.
        spec: of an update.
    """
    privacy = config.privacy
    if not privacy.noised:
        return average(config.server, spec)
    if privacy.noise_multiplier is None or privacy.clip is None:
        raise RuntimeError("privacy.target_epsilon was not turned into noise: see with_noise")
    if privacy.secure_aggregation:
        return FixedSum(spec, config.cohort)
    return PrivateSum(spec, config.cohort)


def count_noise(config: RunConfig) -> float:
    """Return the standard deviation of the noise on a count of updates: a twentieth of a round, or z if more.

    The first is the paper's; the second costs small rounds no more than 16 % of noise on the sum.
    """
    assert config.privacy.noise_multiplier is not None
    return max(config.cohort / 20, config.privacy.noise_multiplier)


def deviation(config: RunConfig, spec: Spec, clip: float) -> float:
    """Return the standard deviation of the noise on a sum of updates.

    Args:
        config: of a run with ``privacy.noise_multiplier``.
        spec: of an update.
        clip: of the round.
    """
    noise = config.privacy.noise_multiplier
    assert noise is not None
    if config.privacy.clip_quantile is not None:
        noise = (noise**-2 - (2 * count_noise(config)) ** -2) ** -0.5
    return noise * reach(clip, spec)


def next_clip(config: RunConfig, clip: float, unclipped: int, answered: int, drawn: float) -> float:
    """Return the next round's clip.

    Args:
        config: of a run with ``privacy.clip_quantile``.
        clip: of this round.
        unclipped: updates that were not longer.
        answered: updates.
        drawn: the count's noise, a standard normal number.
    """
    privacy = config.privacy
    assert privacy.clip_quantile is not None
    half = unclipped - answered / 2
    share = 0.5 + (half + count_noise(config) * drawn) / config.cohort
    return clip * math.exp(-privacy.clip_rate * (share - privacy.clip_quantile))


def plain_sum_of(config: RunConfig, spec: Spec) -> WeightedSum:
    """Return what folds answers that no robust average takes, such as slopes: see :func:`sum_of`."""
    found = sum_of(config, spec)
    assert isinstance(found, WeightedSum), "the registry refuses server.robust here"
    return found


class FixedSum(WeightedSum):
    """A sum of updates in which each counts once, over a fixed number; noise is in it already.

    Args:
        spec: of an update.
        share: number that the sum is divided by, whoever answers.
    """

    def __init__(self, spec: Spec, share: int) -> None:
        super().__init__(spec)
        self.share = share

    def add(self, tensors: Tensors, weight: int) -> None:
        """Fold one update in; it counts once, whatever its number of texts."""
        super().add(tensors, 1)

    def digest(self) -> str:
        """Return a digest of the sum, as it came of the clients: the same sum has the same."""
        found = hashlib.sha256()
        for name, value in self.total().items():
            found.update(f"{name}/{tuple(value.shape)}\n".encode() + value.numpy().tobytes())
        return found.hexdigest()

    def mean(self) -> Tensors:
        """Return the sum over the fixed number, in the spec's dtypes."""
        return {
            name: total.div_(self.share).to(self.spec[name].dtype) for name, total in self.total().items()
        }


class PrivateSum(FixedSum):
    """Such a sum to which the server adds the noise, as one more update.

    Args:
        spec: of an update.
        share: number that the sum is divided by, whoever answers.
    """

    def __init__(self, spec: Spec, share: int) -> None:
        super().__init__(spec, share)
        self._noise: Tensors = {}

    def blur(self, key: bytes, deviation: float) -> None:
        """Add the noise, of so large a standard deviation, that a secret key of 32 bytes expands to.

        Nothing else may come of that key.
        """
        values = sum(math.prod(tensor.shape) for tensor in self.spec.values())
        drawn = gaussian(key, values).mul_(deviation / _UNIT).round_().mul_(_UNIT)
        sizes = [math.prod(self.spec[name].shape) for name in sorted(self.spec)]
        parts = zip(sorted(self.spec), torch.split(drawn, sizes), strict=True)
        self._noise = {name: part.reshape(self.spec[name].shape) for name, part in parts}
        self.count += 1

    def mean(self) -> Tensors:
        """Return sum and noise over the fixed number, in the spec's dtypes.

        Raises:
            RuntimeError: no noise was added.
        """
        if not self._noise:
            raise RuntimeError("a private sum is read before noise was added to it")
        return {
            name: total.add_(self._noise[name]).div_(self.share).to(self.spec[name].dtype)
            for name, total in self.total().items()
        }
