"""What the command line and the Python API both do to run something, and leave as they found it."""

from __future__ import annotations

import logging
import os
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.errors import ConfigError, RunFailed
from fedllm.extras import require
from fedllm.host.accelerator import VARIABLE, choose_device

if TYPE_CHECKING:
    from rich.console import Console

    from fedllm.config import RunConfig

__all__ = [
    "Host",
    "announce",
    "free",
    "go_on",
    "how_to_go_on",
    "require_finished",
    "require_packages",
    "run",
    "undisturbed",
]

_SPEAKING = ("fedllm", "strategies")
"""Loggers whose words are for whoever watches a run."""


@dataclass(frozen=True)
class Host:
    """Where the clients of a run compute; no part of its configuration.

    Attributes:
        engine: ``loopback`` (this process, or a pool of workers) or ``flower`` (Ray).
        workers: processes that answer for the clients; unset is 1, on Ray one per core.
        threads: torch threads of each client, on which a run's last bits depend; unset is a worker's share.

    Raises:
        ConfigError: there is no such engine, or a number is below 1.
    """

    engine: str = "loopback"
    workers: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("loopback", "flower"):
            raise ConfigError(f"--engine is loopback or flower, not {self.engine!r}")
        for name, number in (("workers", self.workers), ("threads", self.threads)):
            if number is not None and number < 1:
                raise ConfigError(f"--{name} is at least 1, not {number}")


def require_packages(host: Host, *, report: bool = False, compared: bool = False) -> None:
    """Refuse at the beginning what would lack a package at the end.

    Raises:
        ConfigError: says what to install.
    """
    if host.engine == "flower":
        require("ray", "--engine flower")
    if report:
        require("matplotlib", "the report")
    if compared:
        require("scipy", "the comparison of several runs")


def free(folder: Path, config: RunConfig, overwrite: bool) -> None:
    """See that a new run may take a folder; what is there is removed, but for what the new run is made from.

    Raises:
        StoreError: a run or other things lie there, or the run that the new one begins from.
    """
    from fedllm.here import held
    from fedllm.runs import folder as run_folder
    from fedllm.runs.records import FILE

    run_folder.require_apart(folder, config.init_from)
    if (folder / FILE).is_file():
        run_folder.require_free(folder, overwrite)
        run_folder.clear(folder, keep=held(config, folder))


def announce(runs: Sequence[tuple[str, RunConfig]], folder: Path, console: Console) -> None:
    """Say what private runs promise, and what runs take, each given with its preset, where it is much."""
    from simulations import costs
    from strategies.private import promise

    for sentence in sorted({promise(config) for _, config in runs if config.privacy.hides}):
        console.print(sentence)
    said = costs.forecast(runs)
    if runs and said.large:
        for sentence in costs.sentences(said, folder):
            console.print(sentence)


def run(
    config: RunConfig,
    folder: Path,
    host: Host,
    console: Console | None,
    *,
    track: Sequence[str] = (),
    label: str = "",
) -> None:
    """Run a configuration to its end, new or left off, and show what happens.

    Args:
        config: the resolved configuration.
        folder: the run folder.
        host: where the clients compute.
        console: where progress is shown; None shows none.
        track: names of trackers that are told of each round.
        label: goes before each line, for one run of many.

    Raises:
        FedllmError: what ended the run.
        KeyboardInterrupt: the run can be resumed.
    """
    import torch

    from fedllm.runs import trackers
    from fedllm.terminal.live import watching
    from simulations.engines import flower, loopback

    with ExitStack() as around:
        around.enter_context(undisturbed())
        logging.getLogger("flwr").setLevel(logging.WARNING)
        opened = around.enter_context(trackers.opened(track, folder, config))
        if console is not None:
            _show_what_is_logged(console, label)
            around.enter_context(watching(folder, console, opened, label))
        cores = torch.get_num_threads()
        if host.engine == "flower":
            flower.simulate(config, folder, host.workers or cores, host.threads or 1)
        else:
            workers = host.workers or 1
            loopback.simulate(config, folder, workers, host.threads or max(1, cores // workers))


def go_on(
    folder: Path, host: Host, console: Console | None, rounds: str | None = None, *, report: bool
) -> bool:
    """Continue the run in a folder, if there is anything left of it to do; return whether there was.

    Args:
        folder: the run folder.
        host: where the clients compute.
        console: where progress is shown; None shows none.
        rounds: of a finished run that is to go on: ``+5`` more, or ``20`` in all.
        report: whether the report is going to be written again.

    Raises:
        FedllmError: it cannot go on from here, or what ended it.
    """
    from fedllm.runs.provenance.identity import require_unedited
    from fedllm.runs.reader import Run

    stored = Run(folder)
    federation = folder.resolve().parent.parent
    if (federation / "federation.toml").is_file():
        raise ConfigError(
            f"{folder} is a federation's run; go on with: fedllm run --resume {folder.resolve().name} "
            f"--server {federation}"
        )
    require_unedited(folder, stored.config, stored.goes_on_as)
    with stored.going_on(rounds) as config:
        if config is None:
            return False
        require_packages(host, report=report)
        run(config, folder, host, console)
    return True


def how_to_go_on(folder: Path) -> str:
    """Return the command that continues a run."""
    return f"go on with: fedllm resume {shlex.quote(str(folder))}"


def require_finished(folders: Sequence[Path]) -> None:
    """A run that was stopped is not a success.

    Raises:
        RunFailed: one of them has rounds left.
    """
    from fedllm.runs.reader import Run

    left = [folder for folder in folders if Run(folder).status != "finished"]
    if left:
        raise RunFailed(f"stopped before the last round; {how_to_go_on(left[0])}")


@contextmanager
def undisturbed(device: str | None = None) -> Iterator[None]:
    """Leave what belongs to the whole process as it was: a notebook goes on after a run.

    These are levels and handlers of loggers, warnings' filters, the number of torch's threads and the device
    that is computed on.

    Args:
        device: to compute on meanwhile, here and in processes that are started; unset leaves the choice.
    """
    import torch

    threads, chosen = torch.get_num_threads(), os.environ.get(VARIABLE)
    loggers = [logging.getLogger(name) for name in ("flwr", *_SPEAKING)]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    with warnings.catch_warnings():
        try:
            if device is not None:
                choose_device(device)
            yield
        finally:
            torch.set_num_threads(threads)
            if chosen is None:
                os.environ.pop(VARIABLE, None)
            else:
                os.environ[VARIABLE] = chosen
            for logger, level, propagate, handlers in before:
                logger.setLevel(level)
                logger.propagate, logger.handlers = propagate, handlers


def _show_what_is_logged(console: Console, label: str) -> None:
    """Show what the library has to say about a run, such as what it can hope for, between the rounds."""
    prefix = f"{label}  " if label else ""

    class Say(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(f"{prefix}{record.getMessage()}")

    for name in _SPEAKING:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [Say()]
