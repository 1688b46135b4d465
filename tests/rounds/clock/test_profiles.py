"""Which device each client is, and what a profile may say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fedllm.config import RunConfig
from fedllm.devices import Device, SimulationConfig, assigned, table
from fedllm.errors import ConfigError

OWN = {"gflops": 1.0, "efficiency": 1.0, "memory_gb": 1.0, "down_mbps": 1.0, "up_mbps": 1.0}


def counts(profile: Any, clients: int, seed: int = 0, **devices: Any) -> Counter[str]:
    simulation = SimulationConfig.model_validate({"profile": profile, "devices": devices})
    return Counter(one.name for one in assigned(simulation, clients, seed))


def test_shares_become_clients() -> None:
    assert counts("phones-4g", 10) == {"phone-high-4g": 2, "phone-mid-4g": 5, "phone-low-4g": 3}
    assert counts("hospital-server", 3) == {"hospital-server": 3}
    assert counts({"mine": 3, "hospital": 1}, 8, mine=OWN) == {"mine": 6, "hospital-server": 2}
    # A profile within a mix keeps its own shares: half of ten clients are two, five and three tenths of five.
    mixed = counts({"phones-4g": 2, "jetson": 2}, 20)
    assert mixed == {"phone-high-4g": 2, "phone-mid-4g": 5, "phone-low-4g": 3, "jetson-orin-nano-wifi": 10}


@pytest.mark.parametrize("clients", [1, 2, 3, 7, 101])
def test_every_client_is_some_device(clients: int) -> None:
    found = counts("phones-4g", clients)
    assert sum(found.values()) == clients
    assert all(
        abs(found[name] - share * clients) < 1
        for name, share in {"phone-high-4g": 0.2, "phone-mid-4g": 0.5, "phone-low-4g": 0.3}.items()
    )


def test_the_seed_decides_who_is_which() -> None:
    simulation = SimulationConfig(profile="phones-4g")
    names = [[one.name for one in assigned(simulation, 50, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert sorted(names[0]) == sorted(names[2])


def test_an_own_device_takes_the_place_of_one_in_the_table() -> None:
    simulation = SimulationConfig.model_validate({"profile": "hospital", "devices": {"hospital-server": OWN}})
    (only,) = assigned(simulation, 1, 0)
    assert only.device == Device.model_validate(OWN)


def test_the_table_is_sound() -> None:
    devices, profiles = table()
    assert {device for shares in profiles.values() for device in shares} == devices.keys()


@pytest.mark.parametrize(
    ("simulation", "said"),
    [
        ({"profile": "phones-5g"}, "neither a profile nor a device; did you mean phones-4g?"),
        ({"profile": {}}, "profile names no device"),
        ({"profile": {"jetson": 0}}, "the share of 'jetson' in profile is 0; right is a number above 0"),
        ({"profile": {"jetson": True}}, "a share is a number, not true or false"),
        ({"devices": {"mine": OWN}}, "devices are used by none while profile is not set: name them there"),
        (
            {"profile": "mine", "devices": {"mine": {**OWN, "gflops": 0}}},
            "simulation.devices.mine.gflops = 0",
        ),
        ({"profile": "mine", "devices": {"mine": {**OWN, "efficiency": 1.5}}}, "less than or equal to 1"),
        (
            {"profile": "mine", "devices": {"mine": {**OWN, "wifi": 1}}},
            "unknown key simulation.devices.mine.wifi",
        ),
    ],
)
def test_what_a_profile_cannot_say_is_refused_in_a_sentence(simulation: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RunConfig.validated({"simulation": simulation})
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_configuration_with_devices_comes_back_from_its_own_text() -> None:
    simulation = {"profile": {"mine": 1.0, "phones-4g": 2.0}, "devices": {"mine": OWN}}
    config = RunConfig.validated({"simulation": simulation})
    assert RunConfig.from_document(config.to_document()) == config
    assert RunConfig.from_json(config.to_json()) == config
