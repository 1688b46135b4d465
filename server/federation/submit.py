"""Runs on a federation that is being served: submit, follow, resume, stop. What ``fedllm run`` does.

The bundle that Flower hands to the nodes names the apps but holds no code: every node runs what is installed
on it. The run's store lies in the server's folder, where the command line follows it as in a simulation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import tomli_w

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, RunFailed
from fedllm.runs.amending import settle
from fedllm.runs.durable import replace_file, to_json
from fedllm.runs.provenance.identity import require_unedited
from fedllm.runs.reader import Run as StoredRun
from fedllm.runs.records import FILE
from server.federation.control import Control, Run, build_bundle

__all__ = [
    "ENDING_SECONDS",
    "SUPERLINK",
    "Submitted",
    "bundle_of",
    "find",
    "follow",
    "log_of",
    "numbers",
    "resume",
    "serves",
    "stop",
    "submit",
]

POLL_SECONDS = 0.5
POLITE_SECONDS = 30.0
ENDING_SECONDS = 20.0
SUPERLINK = "server.federation.superlink"
"""Module that is a SuperLink's process, and so stands on its command line."""


class Submitted(NamedTuple):
    """A run of a federation: Flower's number of it, and the folder of its results."""

    id: int
    folder: Path


def submit(federation: Path, control: Control, config: RunConfig) -> Submitted:
    """Start a run; its results come to lie in ``FEDERATION/runs/NAME``.

    Args:
        federation: the server's folder.
        control: connection to its SuperLink.
        config: the resolved configuration.

    Raises:
        ConfigError: a run of this name is there already or is starting, or it is one for a simulation.
    """
    folder = federation.resolve() / "runs" / config.name
    if (folder / FILE).exists():
        raise ConfigError(
            f"{folder} holds a run already; choose another name (--set name=...), "
            f"or go on with it: fedllm run --resume {config.name}"
        )
    sessions = numbers(federation).get(config.name)
    if sessions and control.run(sessions[-1]).status != "finished":
        raise ConfigError(
            f"{config.name} was submitted a moment ago and is starting; choose another name (--set name=...)"
        )
    config.placed(deployed=True)  # refuses what only a simulation can do
    folder.parent.mkdir(exist_ok=True)
    return _start(federation, control, _placed(config), folder)


def _placed(config: RunConfig) -> RunConfig:
    """Name texts by absolute paths: the server's process reads them too, and it runs in another folder."""
    given = {"path": config.data.path, "test_path": config.data.test_path}
    absolute = {key: str(Path(path).expanduser().absolute()) for key, path in given.items() if path}
    return config.model_copy(update={"data": config.data.model_copy(update=absolute)})


def resume(federation: Path, control: Control, name: str, rounds: str | None = None) -> Submitted:
    """Go on with a run that ended before its last round, from its last checkpoint, or after its end.

    Args:
        federation: the server's folder.
        control: connection to its SuperLink.
        name: of the run.
        rounds: gives a finished run more: ``+5``, or ``20`` in all.
    """
    folder = _folder(federation, name)
    stored = StoredRun(folder)
    _await_end(stored)
    require_unedited(folder, stored.config, stored.goes_on_as)
    with stored.going_on(rounds) as config:
        if config is None:
            raise ConfigError(
                f"{folder} is finished; there is nothing to resume: --rounds +5 gives it five more"
            )
        return _start(federation, control, config, folder)


def _await_end(stored: StoredRun) -> None:
    """Wait for a run's process to end that a SuperLink has left behind: it notices within a few seconds.

    Raises:
        ConfigError: the process is none of those, or does not end.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while (pid := stored.pid) is not None:
        if serves(pid) or time.monotonic() > deadline:
            raise ConfigError(f"{stored.folder} is running (process {pid}); follow it, or stop it first")
        time.sleep(POLL_SECONDS / 5)


def serves(pid: int) -> bool:
    """Whether a process runs under a SuperLink that is alive."""
    try:
        return any(SUPERLINK in parent.cmdline() for parent in psutil.Process(pid).parents())
    except (psutil.Error, ValueError):
        return False  # it has just gone, or has not written yet who it is


def find(federation: Path, name: str) -> Submitted:
    """Look up a submitted run by name or folder."""
    folder = _folder(federation, name)
    sessions = numbers(federation).get(folder.name)
    if sessions is None:
        raise ConfigError(f"{folder} was not submitted to this server")
    return Submitted(sessions[-1], folder)


def follow(control: Control, run: Submitted, *, look: Callable[[Path], None] = lambda folder: None) -> Run:
    """Wait until a run ends.

    Args:
        control: connection to the SuperLink that runs it.
        run: what to wait for.
        look: called twice a second once the run folder is there, for a live table.

    Raises:
        RunFailed: the run did not complete; says why.
    """
    begun = False
    while (state := control.run(run.id)).status != "finished":
        if (run.folder / FILE).exists():
            look(run.folder)
            # Flower waits a minute for a process that was killed; whether there is one can be told at once.
            # Whoever notes how a run ended holds it for an instant too, and serves nobody.
            alive = (pid := StoredRun(run.folder).pid) is not None and serves(pid)
            if begun and not alive and _was_interrupted(run.folder):
                break
            begun = begun or alive
        time.sleep(POLL_SECONDS)
    if not (run.folder / FILE).exists():
        raise RunFailed(f"the run ended before it began: {state.details or _last_words(control, run)}")
    look(run.folder)
    stored = StoredRun(run.folder)
    if stored.status not in ("finished", "stopped"):
        raise RunFailed(
            f"{_reason(stored) or state.details}; go on with: fedllm run --resume {run.folder.name}"
        )
    return state


def stop(control: Control, run: Submitted) -> None:
    """Stop a run after the round it is in; one that does not listen is ended by Flower after 30 s more."""
    stored = StoredRun(run.folder)
    stored.post_command("stop", "fedllm run")
    round_seconds = max((row.seconds for row in stored.rounds()), default=0.0)
    deadline = time.monotonic() + POLITE_SECONDS + 2 * round_seconds
    while control.run(run.id).status != "finished":
        if time.monotonic() > deadline:
            control.stop(run.id)
            return
        time.sleep(POLL_SECONDS)


def bundle_of(serverapp: str, clientapp: str, config: Mapping[str, Any]) -> bytes:
    """Build a Flower app bundle that only names two apps, each as ``module:attribute`` of installed modules.

    Args:
        serverapp: the server's half.
        clientapp: the nodes' half.
        config: keys of the run configuration, with their defaults.
    """
    flower = {
        "publisher": "fedllm",
        "components": {"serverapp": serverapp, "clientapp": clientapp},
        "config": dict(config),
    }
    project = {"name": "fedllm", "version": version("fedllm"), "license": "Apache-2.0"}
    document = tomli_w.dumps({"project": project, "tool": {"flwr": {"app": flower}}})
    return build_bundle({"pyproject.toml": document.encode()})


def _start(federation: Path, control: Control, config: RunConfig, folder: Path) -> Submitted:
    values = {"fedllm": config.to_json(), "run-dir": str(folder)}
    bundle = bundle_of("server.app:app", "client.app:app", dict.fromkeys(values, ""))
    number = control.start(bundle, values)
    known = numbers(federation)
    replace_file(
        _register(federation), to_json({**known, folder.name: [*known.get(folder.name, []), number]})
    )
    return Submitted(number, folder)


def _register(federation: Path) -> Path:
    return federation / "superlink" / "runs.json"


def numbers(federation: Path) -> dict[str, list[int]]:
    """Return Flower's numbers of every run's sessions, by name: a run that was resumed has several."""
    try:
        known: dict[str, list[int]] = json.loads(_register(federation).read_bytes())
    except FileNotFoundError:
        return {}
    return known


def log_of(federation: Path, name: str) -> Path:
    """Where a run's server process writes its log."""
    return federation / "superlink" / "logs" / f"{name}.log"


def _folder(federation: Path, name: str) -> Path:
    folder = federation.resolve() / "runs" / Path(name).name
    if not (folder / FILE).exists():
        known = ", ".join(sorted(path.parent.name for path in folder.parent.glob(f"*/{FILE}"))) or "none"
        raise ConfigError(f"{federation} holds no run {Path(name).name}; its runs are: {known}")
    return folder


def _was_interrupted(folder: Path) -> bool:
    settle(folder)  # where nobody has done it yet
    return StoredRun(folder).status == "interrupted"


def _reason(stored: StoredRun) -> str:
    if stored.status == "interrupted":
        return "the run was interrupted: its server process died"
    failures = [event.message for event in stored.newest_events() if event.kind == "failed"]
    return failures[-1] if failures else f"the run was {stored.status}"


def _last_words(control: Control, run: Submitted) -> str:
    lines = "".join(control.logs(run.id)).strip().splitlines()
    return lines[-1] if lines else "no reason was given"
