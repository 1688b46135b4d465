"""Devices whose time a simulation can count, and which of them each client is.

The table is ``devices.toml`` beside this file, each figure with its source; a run may add devices of its own.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from fedllm.errors import ConfigError
from fedllm.randomness import stream
from fedllm.section import Section
from fedllm.wording import suggest

__all__ = ["Device", "Named", "SimulationConfig", "assigned", "described", "table"]

Shares = Mapping[str, float]


class Device(Section):
    """What decides how long a device takes, and whether it is there."""

    gflops: float = Field(gt=0.0)
    """Peak arithmetic in float32, in 10^9 operations a second."""
    efficiency: float = Field(gt=0.0, le=1.0)
    """Share of it that training gets."""
    memory_gb: float = Field(gt=0.0)
    """Memory that training may use, in 10^9 bytes."""
    down_mbps: float = Field(gt=0.0)
    """Megabits a second, server to device."""
    up_mbps: float = Field(gt=0.0)
    """Megabits a second, device to server."""
    latency_s: float = Field(default=0.0, ge=0.0)
    """Seconds that a message takes beside its bytes, each way."""
    availability: float = Field(default=1.0, gt=0.0, le=1.0)
    """Probability that the device is there when a round begins."""
    session_s: float | None = Field(default=None, gt=0.0)
    """Seconds for which it stays once it is there; when asked, it is anywhere within them. Unset: ever."""

    def computes(self, flops: float) -> float:
        """Return the seconds that so many operations take."""
        return flops / (1e9 * self.gflops * self.efficiency)

    def receives(self, size: int) -> float:
        """Return the seconds that a message of so many bytes takes to the device."""
        return self.latency_s + 8 * size / (1e6 * self.down_mbps)

    def sends(self, size: int) -> float:
        """Return the seconds that a message of so many bytes takes to the server."""
        return self.latency_s + 8 * size / (1e6 * self.up_mbps)


class Named(NamedTuple):
    """A device with its name in the table."""

    name: str
    device: Device


class SimulationConfig(Section):
    """Which devices a simulation's clients are; unset, their time is not simulated."""

    profile: str | dict[str, float] | None = None
    """``phones-4g``, ``raspberry-pi``, ``jetson``, ``hospital``, a device, or a table of these and shares."""
    devices: dict[str, Device] = Field(default_factory=dict)
    """Devices of one's own by name, with the keys of ``fedllm/devices.toml``."""

    @field_validator("profile", mode="before")
    @classmethod
    def _shares(cls, given: Any) -> Any:
        if isinstance(given, dict) and any(isinstance(share, bool) for share in given.values()):
            raise ValueError("a share is a number, not true or false")
        return given

    @model_validator(mode="after")
    def _known(self) -> Self:
        """Refuse what names no device."""
        if self.profile is not None:
            _flat(self)
        elif self.devices:
            raise ValueError("devices are used by none while profile is not set: name them there")
        return self


@lru_cache
def table() -> tuple[Mapping[str, Device], Mapping[str, Shares]]:
    """Return the devices that come with fedllm, and the profiles: shares of devices by name."""
    found = tomllib.loads(files("fedllm").joinpath("devices.toml").read_text(encoding="utf-8"))
    devices = {name: Device.model_validate(one) for name, one in found["devices"].items()}
    return MappingProxyType(devices), MappingProxyType(found["profiles"])


def assigned(simulation: SimulationConfig, clients: int, seed: int) -> tuple[Named, ...]:
    """Return the device that each client is.

    Shares become whole numbers of clients by their largest remainders; the seed decides who is which.

    >>> found = assigned(SimulationConfig(profile={"phones-4g": 1, "hospital": 1}), clients=20, seed=0)
    >>> sorted(one.name for one in found).count("hospital-server")
    10

    Raises:
        ConfigError: no profile is set.
    """
    if simulation.profile is None:
        raise ConfigError("simulation.profile is not set: it says which devices the clients are")
    shares, devices = _flat(simulation), {**table()[0], **simulation.devices}
    names = [name for name, count in _counts(shares, clients).items() for _ in range(count)]
    order = stream(seed, "devices").permutation(clients)
    return tuple(Named(names[place], devices[names[place]]) for place in order)


def described(devices: Sequence[Named]) -> str:
    """Say how many clients are which device.

    >>> described(assigned(SimulationConfig(profile={"jetson": 2, "hospital": 1}), clients=3, seed=0))
    'time is simulated: 1 hospital-server, 2 jetson-orin-nano-wifi'
    """
    counts = Counter(one.name for one in devices)
    return "time is simulated: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _flat(simulation: SimulationConfig) -> dict[str, float]:
    """Return shares of devices, which add up to 1, profiles resolved."""
    profile = simulation.profile
    asked = {profile: 1.0} if isinstance(profile, str) else dict(profile or {})
    built_in, profiles = table()
    devices = built_in.keys() | simulation.devices.keys()
    if not asked:
        raise ValueError("profile names no device")
    shares: dict[str, float] = {}
    for name, share in asked.items():
        if not (share > 0 and math.isfinite(share)):
            raise ValueError(f"the share of {name!r} in profile is {share:g}; right is a number above 0")
        if name not in devices and name not in profiles:
            raise ValueError(
                f"profile names {name!r}, which is neither a profile nor a device"
                f"{suggest(name, [*profiles, *sorted(devices)])}"
            )
        parts = {name: 1.0} if name in devices else profiles[name]
        for device, part in parts.items():
            shares[device] = shares.get(device, 0.0) + share * part / sum(parts.values())
    whole = sum(shares.values())
    return {name: share / whole for name, share in shares.items()}


def _counts(shares: Shares, clients: int) -> dict[str, int]:
    """Share clients out: the whole parts first, what is left by the largest remainders.

    >>> _counts({"a": 0.5, "b": 0.3, "c": 0.2}, 4)
    {'a': 2, 'b': 1, 'c': 1}
    """
    counts = {name: int(share * clients) for name, share in shares.items()}
    by_rest = sorted(shares, key=lambda name: (counts[name] - shares[name] * clients, name))
    for name in by_rest[: clients - sum(counts.values())]:
        counts[name] += 1
    return counts
