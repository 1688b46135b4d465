"""A run's model behind an OpenAI-compatible endpoint of this host, by the server that transformers brings."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedllm.errors import ConfigError, RunFailed
from fedllm.extras import require
from fedllm.runs.reader import Run
from simulations.results.options import Which
from simulations.results.shipping.ship import ship

__all__ = ["serve"]


def serve(
    folder: Path, host: str, port: int, round: Which = None, ready: Callable[[str], None] = lambda name: None
) -> None:
    """Answer requests to ``http://HOST:PORT/v1`` with a run's model until somebody interrupts.

    The adapter is merged into the base's weights, in a folder that is deleted afterwards.

    Args:
        folder: of the run.
        host: address to listen at.
        port: to listen at.
        round: as for :func:`simulations.results.predict.restore`.
        ready: told the name by which requests call the model, before the server begins to load it.

    Raises:
        ConfigError: the run's model does not write on, the port is taken, or a package is not installed.
        RunFailed: the server ended by itself.
        StoreError: as :func:`simulations.results.predict.restore`.
    """
    require("openai", "fedllm serve")
    config = Run(folder).config
    if config.model.task not in ("causal", "instruct", "preference"):
        raise ConfigError(
            f'fedllm serve is for models that write on, and model.task = "{config.model.task}" does not: '
            "take fedllm predict, or fedllm export --format onnx"
        )
    _require_free(host, port)
    with tempfile.TemporaryDirectory() as place:
        written, _ = ship(folder, Path(place) / "merged", "merged", round)
        # Requests must call the model as the server does: by a name, if it is started where the folder lies.
        shutil.move(written, Path(place) / config.name)
        ready(config.name)
        words = ["serve", config.name, "--host", host, "--port", str(port), "--device", "cpu"]
        code = subprocess.run(
            [sys.executable, "-m", "transformers.cli.transformers", *words],
            cwd=place,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            check=False,
        ).returncode
    if code:
        raise RunFailed(f"the server ended with status {code}; its own words stand above")


def _require_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error.strerror}): give another --port"
        ) from error
