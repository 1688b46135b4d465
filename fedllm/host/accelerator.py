"""Where models compute: a setting of each process and of those it starts, not of a run.

A run's numbers depend on it in their last bits only, and every machine of a federation has its own. It is no
part of a configuration, so that a run can be resumed, and asked, on another machine.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fedllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["NAMES", "VARIABLE", "choose_device", "chosen_device", "computes_bfloat16", "converts_bfloat16"]

VARIABLE = "FEDLLM_DEVICE"
"""Environment variable that the option ``--device`` sets, so that workers and Flower's processes follow."""

NAMES = ("auto", "cpu", "cuda", "mps")


def choose_device(name: str) -> str:
    """Let this process, and those it starts from now on, compute on a device; return its name.

    Raises:
        ConfigError: there is no device of that name.
    """
    if name not in NAMES:
        raise _unknown(name)
    os.environ[VARIABLE] = name
    return name


def chosen_device() -> torch.device:
    """Return the device that ``$FEDLLM_DEVICE`` names: ``cpu``, ``cuda``, ``mps`` or (default) ``auto``.

    ``auto`` takes a CUDA device where there is one and the CPU otherwise. Apple's ``mps`` lacks some
    operations and is taken on request only.

    Raises:
        ConfigError: no such device, or this machine has none.
    """
    import torch

    name = os.environ.get(VARIABLE) or "auto"
    if name not in NAMES:
        raise _unknown(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[name]:
        raise ConfigError(f"--device {name}: torch {torch.__version__} finds none here; take cpu or auto")
    return torch.device(name)


def converts_bfloat16(device: torch.device) -> bool:
    """Whether a device has no arithmetic for bfloat16 and converts every number, at many times the time.

    On x86 those without AVX512-BF16 or AMX; what torch cannot tell of is taken to have it.
    """
    return device.type == "cpu" and bool(_of_processor()) and not computes_bfloat16(device)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device is known to have arithmetic for bfloat16; what torch cannot tell of is not."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = _of_processor() if device.type == "cpu" else {}
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _of_processor() -> dict[str, object]:
    """Return what torch says that the processor can do, by name; nothing where it cannot tell."""
    import torch

    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"--device (or {VARIABLE}) is one of {', '.join(NAMES)}, not {name!r}")
