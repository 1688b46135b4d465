"""``fedllm plan``: what a device has, as the command line says it, and the plan as people read it."""

from __future__ import annotations

import dataclasses
import re

import psutil
import torch
from pydantic import ValidationError
from rich.table import Table

from client.device.participation import parse_bytes
from fedllm.config import RunConfig
from fedllm.config.mistakes import explain
from fedllm.devices import SimulationConfig, assigned
from fedllm.errors import ConfigError
from fedllm.terminal.console import console, print_json, results
from fedllm.wording import human_bytes, human_seconds
from simulations.planner import SPREAD, Limits, Plan, matmul_rate, plan

__all__ = ["bits_per_second", "limits", "show"]

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def bits_per_second(text: str) -> float:
    """Read a rate of transfer.

    >>> bits_per_second("1Mbit/s"), bits_per_second("64 kbit/s")
    (1000000.0, 64000.0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)bit/s\s*", text.lower())
    if found is None or not float(found[1]):
        raise ConfigError(f"--uplink {text!r} is no rate; write 1Mbit/s, 500kbit/s or 1Gbit/s")
    return float(found[1]) * _PREFIXES[found[2]]


def limits(config: RunConfig, memory: str | None, uplink: str | None, profile: str | None) -> Limits:
    """Return what a device has: as given, else as a profile's slowest device has it, else as this host.

    Raises:
        ConfigError: an amount or a profile cannot be read.
    """
    resident = psutil.Process().memory_info().rss  # this process has loaded what one that trains has
    room = float(parse_bytes(memory)) if memory else None
    link = bits_per_second(uplink) if uplink else None
    if profile is None:
        rate = matmul_rate(config)
        return Limits(room, (link, link) if link else None, lambda flops: flops / rate, resident)
    try:
        clients = assigned(SimulationConfig(profile=profile), 100, config.seed)
    except ValidationError as error:
        raise ConfigError(explain(error, SimulationConfig, prefix=("simulation",))) from error
    device = max((one.device for one in clients), key=lambda one: one.computes(1.0))
    own = (1e6 * device.up_mbps, 1e6 * device.down_mbps)
    return Limits(room or 1e9 * device.memory_gb, (link, link) if link else own, device.computes, resident)


def show(config: RunConfig, device: Limits, as_json: bool) -> None:
    """Plan, and print the plan on stdout.

    Raises:
        FedllmError: the model cannot be found or read.
    """
    made = plan(config, device, lambda way: console.print(f"counting {way} ..."))
    if as_json:
        print_json(
            {
                "chosen": made.chosen,
                "why": made.why,
                "memory": device.memory,
                "threads": torch.get_num_threads(),
                "ways": [dataclasses.asdict(one) for one in made.estimates],
            }
        )
        return
    results.print(_table(made))
    print(f"{made.chosen or 'none'}: {made.why}")
    if chosen := next((one for one in made.estimates if one.way == made.chosen), None):
        words = " ".join(f"--set '{key}={value}'" for key, value in chosen.settings.items())
        print(f"fedllm simulate ... {words}")


def _table(made: Plan) -> Table:
    columns = ("way", "fits", "model", "a step above it", "+-", "in all", "s a step, at least", "up", "down")
    table = Table(*columns, "a round, at least")
    for one in made.estimates:
        if one.refused:
            table.add_row(one.way, "no", *[""] * 7, one.refused)
            continue
        table.add_row(
            one.way + (" *" if one.way == made.chosen else ""),
            "yes" if one.fits else "no",
            human_bytes(one.model),
            human_bytes(one.step),
            f"{SPREAD[one.way]:.0%}" if SPREAD[one.way] is not None else "not measured",
            human_bytes(one.total),
            human_seconds(one.seconds),
            human_bytes(one.up),
            human_bytes(one.down),
            human_seconds(one.round),
        )
    return table
