"""The device is a setting of a process: known names, present devices, and what is started follows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fedllm.errors import ConfigError
from fedllm.host.accelerator import VARIABLE, choose_device, chosen_device


def test_the_device_is_a_setting_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "auto")
    assert chosen_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    choose_device("cpu")
    assert os.environ[VARIABLE] == "cpu"
    assert chosen_device() == torch.device("cpu")
    code = f"import os; print(os.environ[{VARIABLE!r}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"cpu\n"


def test_a_device_that_is_unknown_or_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "auto")
    with pytest.raises(ConfigError, match=r"one of auto, cpu, cuda, mps, not 'gpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choose_device("cuda")
    with pytest.raises(ConfigError, match=r"--device cuda: torch .* finds none here; take cpu or auto"):
        chosen_device()
    monkeypatch.setenv(VARIABLE, "gpu")
    with pytest.raises(ConfigError, match="not 'gpu'"):
        chosen_device()
