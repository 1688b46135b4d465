"""A device that takes part: ``fedllm client BUNDLE``.

Two processes are kept alive: Flower's SuperNode, which talks to the server, and the resident worker, which
holds model and data. Both end with this one. One folder holds what must last: local tensors and
answers, by run.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import filelock
import platformdirs
import psutil
import tomli_w

from client.checks import Bundle, check
from client.journal import log_of
from fedllm.errors import ConfigError
from fedllm.processes import Child, Kept, interruptible, open_log
from fedllm.resources import resident_bytes

__all__ = ["Device", "join", "parse_bytes", "state_folder"]

NOT_ACTIVATED = 2004
"""Flower's code for a node that may not connect: unknown, or not yet known to have left."""

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
        memory: bytes that the worker may allocate; None leaves it to the system.
        threads: threads that the worker computes with; None leaves it to torch.
        pause_on_battery: take no part while the device runs on battery.
        pause_on_metered: take no part while NetworkManager calls the link metered.
        insecure: no TLS and no key, as the server was started.
    """

    bundle: Bundle
    state: Path
    data: Path | None = None
    memory: int | None = None
    threads: int | None = None
    pause_on_battery: bool = False
    pause_on_metered: bool = False
    insecure: bool = False

    @property
    def log(self) -> Path:
        """The rotating log of both processes."""
        return log_of(self.state)

    def reason_to_pause(self) -> str | None:
        """Why the device should take no part now, if there is a reason."""
        battery = psutil.sensors_battery() if self.pause_on_battery else None
        if battery is not None and not battery.power_plugged:
            return "on battery"
        if self.pause_on_metered and _metered():
            return "on a metered link"
        return None


@dataclass
class _Progress:
    """What the SuperNode's own messages tell."""

    doing: str = "connecting"
    round: str = ""
    answers: int = 0
    busy: bool = False
    refused: bool = False

    def read(self, line: str) -> None:
        if found := re.search(r"ROUND (\S+)\]", line):
            self.round = found[1]
        elif "SuperNode ID:" in line:
            self.doing, self.refused = "waiting for work", False
        elif f"[code: {NOT_ACTIVATED}]" in line:
            self.refused = True
        elif "Receiving:" in line:
            self.doing, self.busy = f"working on round {self.round}", True
        elif "Sent successfully" in line or "Ignoring reply" in line or "Failed to send" in line:
            self.answers += "Sent successfully" in line
            self.doing, self.busy = "waiting for work", False


@dataclass
class _Processes:
    worker: Kept
    supernode: Kept
    progress: _Progress = field(default_factory=_Progress)


def join(
    device: Device,
    *,
    report: Callable[[str], None],
    status: Callable[[str], None] = lambda line: None,
    stop: threading.Event | None = None,
) -> None:
    """Take part until Ctrl-C (or ``stop``), reconnecting for ever.

    Args:
        device: how to take part.
        report: receives a sentence when something happened.
        status: receives the status line whenever it changes.
        stop: ends the device; None listens to Ctrl-C.

    Raises:
        ConfigError: another client uses the same state folder.
    """
    device.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sole_user(device.state))
        event = stack.enter_context(interruptible()) if stop is None else stop
        # A Unix socket's path may have 107 characters, which a state folder's can exceed.
        sockets = Path(tempfile.mkdtemp(prefix="fedllm-"))
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        log = open_log(device.log)

        def tell(sentence: str) -> None:
            log.info("device: %s", sentence)
            report(sentence)

        log.info("device: fedllm %s starts as node %d", version("fedllm"), device.bundle.node)
        processes = _prepare(device, sockets / "worker", log)
        stack.callback(processes.worker.stop)
        stack.callback(processes.supernode.stop)
        _tend(device, processes, event, tell, status)
        log.info("device: stopped")
    report("stopped")


def _tend(
    device: Device,
    processes: _Processes,
    stop: threading.Event,
    report: Callable[[str], None],
    status: Callable[[str], None],
) -> None:
    shown = ""
    ticks = 0
    reason = device.reason_to_pause()
    while not stop.is_set():
        if ticks % 20 == 19:
            reason = device.reason_to_pause()
        if reason and not processes.progress.busy:
            processes.supernode.stop()
            processes.worker.stop()
        else:
            _revive(device, processes, report)
        line = _line(device, processes, reason)
        if line != shown and (ticks % 2 == 0 or not shown):
            status(line)
            shown = line
        ticks += 1
        stop.wait(0.5)


def _revive(device: Device, processes: _Processes, report: Callable[[str], None]) -> None:
    pid = processes.worker.pid
    # The system refuses allocations beyond the limit; this catches memory that it does not count as such.
    if device.memory is not None and pid is not None and resident_bytes(pid) > 1.1 * device.memory:
        report(f"the worker holds more than {device.memory / 1e9:.1f} GB; it is started anew")
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    if ended := processes.worker.tend():
        report(ended)
    if ended := processes.supernode.tend():
        processes.progress.doing, processes.progress.busy = "connecting", False
        report(ended)
        _explain(device, processes.progress, report)


def _explain(device: Device, progress: _Progress, report: Callable[[str], None]) -> None:
    """Say why the SuperNode may have ended, and what to mend."""
    if device.insecure:
        return
    bad = [item for item in check(device.bundle, state=device.state, memory=device.memory) if not item.good]
    for finding in bad:
        report(f"{finding.name}: {finding.sentence}")
    if progress.refused and not bad:
        report("the server still counts this node's last connection; it lets the node in within a minute")


def _line(device: Device, processes: _Processes, reason: str | None) -> str:
    progress = processes.progress
    doing = f"paused {reason}" if reason and not progress.busy else progress.doing
    pid = processes.worker.pid
    # In steps of 0.1 GB, so that a log is not filled with every breath of the allocator.
    held = f"worker {resident_bytes(pid) / 1e9:.1f} GB" if pid is not None else "worker down"
    parts = [
        f"node {device.bundle.node} of {device.bundle.server}",
        doing,
        f"{progress.answers} answers",
        held,
    ]
    if restarts := processes.worker.restarts + processes.supernode.restarts:
        parts.append(f"{restarts} restarts")
    return " | ".join(parts)


def _prepare(device: Device, worker_socket: Path, log: logging.Logger) -> _Processes:
    progress = _Progress()
    node = device.state / "node.toml"
    facts: dict[str, str | int] = {
        "partition-id": device.bundle.node,
        "state-dir": str(device.state.resolve()),
        "worker-socket": str(worker_socket),
    }
    if device.data is not None:
        facts["data"] = str(device.data.resolve())
    node.write_text(tomli_w.dumps(facts), encoding="utf-8")
    worker = Kept("worker", lambda: Child(_worker_command(device, worker_socket), _threads(device), log))
    environment = {
        "FLWR_HOME": str(device.state.resolve() / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }
    command = _supernode_command(device, node)
    supernode = Kept(
        "connection",
        lambda: Child([*command, "--port", str(_free_port())], environment, log, progress.read),
    )
    return _Processes(worker, supernode, progress)


def _worker_command(device: Device, worker_socket: Path) -> list[str]:
    limit = [] if device.memory is None else ["--memory", str(device.memory)]
    return [sys.executable, "-m", "client.resident", "--socket", str(worker_socket), *limit]


def _supernode_command(device: Device, node: Path) -> list[str]:
    bundle = device.bundle
    keys = ("--root-certificates", str(bundle.authority), "--auth-supernode-private-key", str(bundle.key))
    return [
        *(sys.executable, "-m", "client.supernode", "--superlink", bundle.server),
        *(["--insecure"] if device.insecure else keys),
        *("--node-config", str(node)),
    ]


def _threads(device: Device) -> dict[str, str]:
    if device.threads is None:
        return {}
    number = str(device.threads)
    return {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "OPENBLAS_NUM_THREADS": number}


@contextlib.contextmanager
def _sole_user(state: Path) -> Iterator[None]:
    lock = filelock.FileLock(state / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ConfigError(
            f"another client uses {state}; stop it, or give this one its own --state"
        ) from error
    with lock:
        lock.release()
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _metered() -> bool:
    """Whether NetworkManager calls any active link metered; False where there is no NetworkManager."""
    command = shutil.which("nmcli")
    if command is None:
        return False
    try:
        answer = subprocess.run(
            [command, "-t", "-f", "GENERAL.METERED", "device", "show"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return any(line.partition(":")[2].startswith("yes") for line in answer.stdout.splitlines())
