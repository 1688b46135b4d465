"""Runs as processes of their own: whatever becomes of the dashboard, they go on.

The dashboard imports nothing of what it starts. It speaks the same command line that a person would.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedllm import presets, tasks
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, FedllmError
from fedllm.runs.durable import replace_file
from fedllm.runs.records import FILE
from server.dashboard.actions import federation
from server.dashboard.errors import Missing
from strategies.registry import methods, resolve_keys

__all__ = ["Launcher", "setting"]

PATIENCE_S = 120.0
LOG_TAIL = 64_000
_FEDLLM = [sys.executable, "-P", "-c", "from fedllm.cli import main; main()"]


class Launcher:
    """Starts runs below ``root``.

    Args:
        root: folder of runs.
        state: the dashboard's own folder, for drafts and logs.
        served: folder of the federation that runs are submitted to; None simulates on this host.
    """

    def __init__(self, root: Path, state: Path, served: Path | None = None) -> None:
        self.root, self.federation = root, served
        self._drafts, self._logs = state / "drafts", state / "logs"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._submitted: set[str] = set()

    def presets(self) -> list[dict[str, str]]:
        """Return ``name``, ``shows`` and ``costs`` of every preset."""
        return [{"name": p.name, "shows": p.shows, "costs": p.costs} for p in presets.presets()]

    def schemas(self) -> dict[str, Any]:
        """Return the configuration's JSON schema (``run``) and those of every method's options, by name."""
        options = {name: schema.model_json_schema() for name, schema in methods().items()}
        run = RunConfig.model_json_schema()
        run["$defs"]["ModelConfig"]["properties"]["task"]["enum"] = tasks.names()
        return {"run": run, "methods": options}

    def document(self, preset: str) -> dict[str, Any]:
        """Return what a preset gives, checked; what it leaves unset is not in it.

        Raises:
            Missing: there is no such preset.
        """
        # Names only: a path would let an operator read files through error messages.
        if preset not in [row["name"] for row in self.presets()]:
            raise Missing(f"there is no preset {preset!r}")
        return resolve_keys(presets.document(preset)).to_document(given=True)

    def resolve(self, document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration with settings such as ``{"training.local_steps": 4}``, checked.

        Raises:
            ConfigError: names the key, what was given and what is allowed.
        """
        overrides = [part for key, value in settings.items() for part in ("--set", setting(key, value))]
        # A file of its own: others may be having theirs checked at the same time.
        with tempfile.TemporaryDirectory(prefix="fedllm-") as folder:
            draft = Path(folder) / "draft.toml"
            draft.write_text(tomli_w.dumps(dict(document)), encoding="utf-8")
            command = "run" if self.federation is not None else "simulate"
            found = _run(command, str(draft), *overrides, "--dry-run")
            resolved: dict[str, Any] = found if isinstance(found, dict) else found[0]
            return resolved

    def start(self, name: str, document: Mapping[str, Any]) -> None:
        """Start a run from a resolved configuration."""
        draft = self._draft(name, {**document, "name": name})
        if self.federation is not None:
            _run("run", str(draft), "--server", str(self.federation), "--detach")
            self._submitted.add(name)
        else:
            self._spawn(name, ["simulate", str(draft), "--out", str(self.root / name)])

    def go_on(self, name: str) -> None:
        """Go on with a run at its last checkpoint."""
        if self.federation is not None:
            _run("run", "--resume", name, "--server", str(self.federation), "--detach")
        else:
            self._spawn(name, ["resume", str(self.root / name)])

    def export(self, name: str, round: int, place: Path) -> None:
        """Write a run's result as it was after a round into ``place``, which is made."""
        _run("export", str(self.root / name), str(place), "--round", str(round))

    def report(self, name: str) -> Path:
        """Write a run's ``report.html`` and return its path."""
        return Path(_run("report", str(self.root / name))["written"])

    def starting(self) -> dict[str, str]:
        """Return the runs that have no folder yet, each with why it never will, or with nothing so far."""
        spawned = {
            name: (self._last_words(name) if process.poll() else "")
            for name, process in self._processes.items()
            if process.poll() != 0
        }
        submitted = dict.fromkeys(self._submitted, "")
        begun = {name for name in spawned | submitted if (self.root / name / FILE).is_file()}
        self._submitted -= begun
        if self.federation is not None:
            submitted = {
                name: self._last_words(name) if federation.ended(self.federation, name) else ""
                for name in self._submitted
            }
        return {name: reason for name, reason in (spawned | submitted).items() if name not in begun}

    def dismiss(self, name: str) -> None:
        """Say no more of a run that never began."""
        self._processes.pop(name, None)
        self._submitted.discard(name)

    def busy(self, name: str) -> bool:
        """Whether a process that was started here for this run goes on."""
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def log(self, name: str) -> str:
        """Return the end of what a run's process has printed: one started here, or the federation's."""
        path = self._logs / f"{name}.log"
        if self.federation is not None:
            path = federation.log_of(self.federation, name)
        try:
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - LOG_TAIL))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _spawn(self, name: str, arguments: Sequence[str]) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{name}.log").open("wb") as log:
            # A session of its own: neither Ctrl-C here nor the end of the dashboard ends the run.
            self._processes[name] = subprocess.Popen(
                [*_FEDLLM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _draft(self, name: str, document: Mapping[str, Any]) -> Path:
        self._drafts.mkdir(parents=True, exist_ok=True)
        draft = self._drafts / f"{name}.toml"
        replace_file(draft, tomli_w.dumps(dict(document)))
        return draft

    def _last_words(self, name: str) -> str:
        lines = [line.strip() for line in self.log(name).splitlines() if line.strip()]
        return lines[-1].removeprefix("error: ") if lines else "it ended without a word"


def _run(*arguments: str) -> Any:
    """Run a command to its end and return its answer; its refusal becomes a ``ConfigError``."""
    command = [*_FEDLLM, *arguments, "--json"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FedllmError(
            f"fedllm did not answer within {PATIENCE_S:.0f} s; is the host overloaded?"
        ) from error
    except OSError as error:
        if error.errno == errno.E2BIG:
            raise ConfigError("the settings are too long: put what is long into a file") from error
        raise FedllmError(f"cannot run fedllm: {error.strerror}") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        raise FedllmError(f"fedllm ended with exit status {done.returncode} and without an answer") from error
    if done.returncode:
        raise ConfigError(answer["error"]["message"])
    return answer


def setting(key: str, value: Any) -> str:
    """Write one setting as ``--set`` takes it.

    >>> setting("codec.up", "quantize(bits=8)"), setting("tuning.targets", ["query", "value"])
    ('codec.up="quantize(bits=8)"', 'tuning.targets=["query", "value"]')
    """
    if isinstance(value, list):
        return f"{key}=[{', '.join(_toml(item) for item in value)}]"
    return f"{key}={_toml(value)}"


def _toml(value: Any) -> str:
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()
