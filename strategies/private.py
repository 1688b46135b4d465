"""A sum under client-level differential privacy: fixed denominator, clients alike, noise added once.

    update  =  (sum over the round's clients of u_k  +  N(0, (z C)^2 I)) / m

(McMahan et al., ICLR 2018, the estimator of a fixed denominator): ||u_k|| <= C = ``privacy.clip`` is held by
:mod:`fedllm.protocol.uplink` on both sides, z is ``privacy.noise_multiplier``, and m = ``server.sample`` the
clients of a round on average. Whoever does not answer adds zero, so that dropouts change neither noise nor m.

The sum is an integer multiple of 2^-36, and so is the noise, rounded: what is published is a rounded Gaussian
around an exact sum, without the pattern that floating-point noise leaves in its low bits (Mironov, CCS 2012).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedllm import extras
from fedllm.accounting import epsilon_of, least_noise, usual_delta
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.protocol.uplink import ROUNDING
from fedllm.sums import WeightedSum
from fedllm.tensors import Spec, Tensors
from fedllm.wording import number
from strategies.robust import Kept, average

__all__ = [
    "PrivateSum",
    "delta_of",
    "gaussian",
    "promise",
    "reach",
    "spent",
    "sum_of",
    "uniform",
    "with_noise",
]

_UNIT = 2.0**-36
"""Of :class:`fedllm.sums.WeightedSum`."""
_BITS = 52


def delta_of(config: RunConfig) -> float:
    """Return the run's delta: as given, or n^-1.1 for n clients."""
    return config.privacy.delta or usual_delta(config.clients)


def spent(config: RunConfig, releases: Mapping[int, int]) -> float:
    """Return the epsilon of releases; see :func:`fedllm.accounting.epsilon_of`.

    Args:
        config: of a run with ``privacy.noise_multiplier``.
        releases: how many rounds released so many sums each, by that number.
    """
    assert config.privacy.noise_multiplier is not None
    rate = config.cohort / config.clients
    return epsilon_of(releases, rate, config.privacy.noise_multiplier, delta_of(config))


def with_noise(config: RunConfig) -> RunConfig:
    """Return a run that has a budget and no noise with the least noise that keeps to it.

    Raises:
        ConfigError: ``dp-accounting`` is not installed, or the budget is less than one round spends.
    """
    privacy = config.privacy
    if not privacy.noised:
        return config
    extras.require("dp_accounting", "differential privacy (section privacy)")
    target, rate = privacy.target_epsilon, config.cohort / config.clients
    if target is None:
        return config
    if privacy.noise_multiplier is None:
        noise = least_noise(target, config.rounds, rate, delta_of(config))
        return config.model_copy(update={"privacy": privacy.model_copy(update={"noise_multiplier": noise})})
    if (first := spent(config, {1: 1})) > target:
        raise ConfigError(
            f"privacy.noise_multiplier = {privacy.noise_multiplier:g} spends epsilon = {number(first)} in a "
            f"round, more than privacy.target_epsilon = {target:g}: raise one of them, or leave out the noise"
        )
    return config


def promise(config: RunConfig) -> str:
    """Say what a differentially private run promises, and how."""
    privacy, after = config.privacy, spent(config, {1: config.rounds})
    budget = privacy.target_epsilon
    said = f"epsilon = {number(after)} at delta = {delta_of(config):.3g} after {config.rounds} rounds"
    if budget is not None and after > budget:
        said = f"epsilon = {budget:g} at delta = {delta_of(config):.3g}, spent before round {config.rounds}"
    return (
        f"differential privacy of each client: {said}; noise_multiplier = {privacy.noise_multiplier:g}, "
        f"clip = {privacy.clip:g}; each of {config.clients} clients takes part with probability "
        f"{config.cohort / config.clients:g}, and counts alike, however many texts it has"
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
    return PrivateSum(spec, config.cohort, privacy.noise_multiplier * reach(privacy.clip, spec))


class PrivateSum(WeightedSum):
    """A sum of updates in which each counts once, over a fixed number, and the noise as one more.

    Args:
        spec: of an update.
        share: number that the sum is divided by, whoever answers.
        deviation: standard deviation of the noise.
    """

    def __init__(self, spec: Spec, share: int, deviation: float) -> None:
        super().__init__(spec)
        self.share, self.deviation = share, deviation
        self._noise: Tensors = {}

    def add(self, tensors: Tensors, weight: int) -> None:
        """Fold one update in; it counts once, whatever its number of texts."""
        super().add(tensors, 1)

    def digest(self) -> str:
        """Return a digest of the sum without noise: the same sum has the same."""
        found = hashlib.sha256()
        for name, value in self.total().items():
            found.update(f"{name}/{tuple(value.shape)}\n".encode() + value.numpy().tobytes())
        return found.hexdigest()

    def blur(self, key: bytes) -> None:
        """Add the noise that a secret key of 32 bytes, never used for anything else, expands to."""
        values = sum(math.prod(tensor.shape) for tensor in self.spec.values())
        drawn = gaussian(key, values).mul_(self.deviation / _UNIT).round_().mul_(_UNIT)
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


def uniform(key: bytes, count: int) -> np.ndarray:
    """Return numbers in (0, 1), of 52 bits each, from the ChaCha20 stream (RFC 8439) of a key of 32 bytes.

    >>> bool((uniform(bytes(32), 1000) < 1).all())
    True
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
    return ((np.frombuffer(stream, dtype="<u8") >> (64 - _BITS)) + 0.5) * 2.0**-_BITS


def gaussian(key: bytes, count: int) -> torch.Tensor:
    """Return standard normal numbers in float64: the normal quantiles of :func:`uniform`.

    >>> torch.equal(gaussian(bytes(32), 3), gaussian(bytes(32), 4)[:3])
    True
    """
    drawn: torch.Tensor = torch.special.ndtri(torch.from_numpy(uniform(key, count)))
    return drawn
