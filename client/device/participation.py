"""How a device takes part: what its owner has chosen and allows."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs
import psutil

from client.device.accepted import APP
from client.device.bundle import Bundle
from client.device.checks import Finding
from client.device.collection import Bounds
from client.device.journal import log_of
from fedllm.errors import ConfigError

__all__ = ["IDLE_SECONDS", "Device", "parse_bytes", "state_folder"]

IDLE_SECONDS = 60.0
"""So long a worker without work keeps its memory, unless the device is told otherwise."""

_NETWORK_MANAGER = "nmcli"
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1024, "MI": 1024**2, "GI": 1024**3}


def parse_bytes(text: str) -> int:
    """Read an amount of memory.

    >>> parse_bytes("2GiB"), parse_bytes("1.5 GB"), parse_bytes("4096")
    (2147483648, 1500000000, 4096)
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or found[1].count(".") > 1 or found[1] == ".":
        raise ConfigError(f"{text!r} is not an amount of memory; write 2GiB, 1500MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def state_folder(bundle: Bundle) -> Path:
    """Where a node's durable state lies unless ``--state`` says otherwise."""
    return platformdirs.user_data_path("fedllm") / f"{bundle.host_and_port[0]}-node-{bundle.node}"


@dataclass(frozen=True)
class Device:
    """How one node takes part.

    Attributes:
        bundle: its keys and the server's address.
        state: folder of its durable state.
        data: its own texts; None takes its part of the data that the run's configuration names.
        text, label: columns by which the texts are counted at the start; a run names its own.
        memory: bytes that the worker may allocate; None leaves it to the system.
        threads: threads that the worker computes with; None leaves it to torch.
        idle_unload: seconds without work after which the worker ends; 0 keeps what was loaded once.
        bounds: of how many runs, and how many bytes, the state is kept.
        pause_on_battery: take no part while the device runs on battery.
        pause_on_metered: take no part while NetworkManager calls the link metered.
        insecure: no TLS and no key, as the server was started.
        secure_only: take no part in a run in which the server would see this device's update by itself.
        peers: file with certificates of those with whom it sits in a sum; None takes all of its federation.
        apps: installed Flower apps that it runs, as ``module:attribute``.
    """

    bundle: Bundle
    state: Path
    data: Path | None = None
    text: str = "text"
    label: str | None = "label"
    memory: int | None = None
    threads: int | None = None
    idle_unload: float = IDLE_SECONDS
    bounds: Bounds = field(default_factory=Bounds)
    pause_on_battery: bool = False
    pause_on_metered: bool = False
    insecure: bool = False
    secure_only: bool = False
    peers: Path | None = None
    apps: tuple[str, ...] = (APP,)

    @property
    def log(self) -> Path:
        """The rotating log of both processes."""
        return log_of(self.state)

    def reason_to_pause(self) -> str | None:
        """Why the device should take no part now, if there is a reason."""
        battery = psutil.sensors_battery() if self.pause_on_battery else None
        if battery is not None and not battery.power_plugged:
            return "on battery"
        if not self.pause_on_metered:
            return None
        try:
            return "on a metered link" if _metered() else None
        except OSError as error:
            return f"as NetworkManager does not say whether the link is metered ({error})"

    def pauses_in_vain(self) -> Finding | None:
        """Find what was asked to pause for and cannot be seen on this device, if there is such."""
        if self.pause_on_metered and shutil.which(_NETWORK_MANAGER) is None:
            return Finding(
                "pause",
                False,
                f"--pause-on-metered asks NetworkManager ({_NETWORK_MANAGER}), which is not on this device; "
                "install it, or leave the option out",
            )
        return None


def _metered() -> bool:
    """Whether NetworkManager calls any active link metered; ``OSError`` where it does not answer."""
    try:
        answer = subprocess.run(
            [_NETWORK_MANAGER, "-t", "-f", "GENERAL.METERED", "device", "show"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError("no answer within 5 s") from error
    except subprocess.CalledProcessError as error:
        raise OSError(error.stderr.strip() or f"status {error.returncode}") from error
    return any(line.partition(":")[2].startswith("yes") for line in answer.stdout.splitlines())
