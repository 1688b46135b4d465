"""A device that takes part: ``fedllm client BUNDLE``.

One process is kept alive, Flower's SuperNode, which talks to the server. The resident worker, which holds
model and data, is started when there is work and ends when there has been none for a while: that is what
gives all of its memory back. Both end with this one, which itself loads neither torch nor Flower. One folder
holds what must last: local tensors and answers, by run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import tomli_w

from client.device.bundle import Bundle
from client.device.checks import check_here, check_peers
from client.device.collection import collect
from client.device.participation import Device
from client.device.screen import Progress
from client.device.trial import try_network, try_texts
from client.device.troubles import Background, Presence, sole_user
from fedllm.errors import ConfigError
from fedllm.host.processes import Child, Kept, interruptible, open_log
from fedllm.host.resources import resident_bytes
from fedllm.runs.durable import disk_errors

__all__ = ["join"]

LOOK_TICKS = 20
"""Half seconds between two looks at battery, link and disk."""
LEAST_ROOM = 1 << 20
"""Bytes free below which a disk counts as full."""


@dataclass
class _Processes:
    worker: Kept
    supernode: Kept
    progress: Progress
    presence: Presence
    network: Background
    texts: Background | None
    told: tuple[str, ...] = ()
    """What the last diagnosis found, so that it is reported once."""


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
        ConfigError: another client uses the same bundle or state folder, the folder is another user's, the
            texts are not there, or what it should pause for cannot be seen.
        StoreError: the state folder cannot be written.
    """
    if device.data is not None and not device.data.exists():
        raise ConfigError(f"--data {device.data} does not exist")
    if (vain := device.pauses_in_vain()) is not None:
        raise ConfigError(vain.sentence)
    if not (peers := check_peers(device.bundle, device.peers, insecure=device.insecure)).good:
        raise ConfigError(peers.sentence)
    with contextlib.ExitStack() as stack:
        with disk_errors(device.state):
            _make_private(device.state)
            stack.enter_context(sole_user(device.bundle, device.state))
            log = open_log(device.log)
        event = stack.enter_context(interruptible()) if stop is None else stop
        # A Unix socket's path may have 107 characters, which a state folder's can exceed.
        sockets = Path(tempfile.mkdtemp(prefix="fedllm-"))
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)

        def tell(sentence: str) -> None:
            log.info("device: %s", sentence)
            report(sentence)

        for sentence in (*_introduction(device), *collect(device.state, device.bounds)):
            tell(sentence)
        with disk_errors(device.state):
            processes = _prepare(device, sockets / "worker", log)
        stack.callback(processes.worker.stop)
        stack.callback(processes.supernode.stop)
        _tend(device, processes, event, tell, status)
        log.info("device: stopped")
    report("stopped")


def _introduction(device: Device) -> Iterator[str]:
    """Say who takes part in what, with what, and what of that will not do."""
    bundle = device.bundle
    yield f"fedllm {version('fedllm')}: node {bundle.node} of {bundle.server}"
    texts = "its part of the texts that each run names" if device.data is None else str(device.data.resolve())
    yield f"data: {texts}"
    allowed = (
        "as much memory as it takes" if device.memory is None else f"{device.memory / 1e9:.1f} GB at most"
    )
    computes = "" if device.threads is None else f", {device.threads} threads"
    if device.peers is not None:
        yield f"peers: {check_peers(bundle, device.peers).sentence}"
    yield f"worker: {allowed}{computes}; state: {device.state.resolve()}"
    if device.pause_on_battery and psutil.sensors_battery() is None:
        yield "pause: no battery is seen on this device, so --pause-on-battery never pauses it"
    for finding in check_here(bundle, device.state, device.memory):
        if not finding.good:
            yield f"{finding.name}: {finding.sentence}"


def _tend(
    device: Device,
    processes: _Processes,
    stop: threading.Event,
    report: Callable[[str], None],
    status: Callable[[str], None],
) -> None:
    shown = ""
    ticks = 0
    if processes.texts is not None:
        processes.texts.begin()
    reason = device.reason_to_pause()
    while not stop.is_set():
        if ticks % LOOK_TICKS == LOOK_TICKS - 1:
            reason = device.reason_to_pause()
            processes.progress.note_full(shutil.disk_usage(device.state).free < LEAST_ROOM)
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
    _tend_worker(processes.worker, processes.progress, device.idle_unload, report)
    if ended := processes.supernode.tend():
        processes.progress.disconnect()
        report(ended)
    _explain(device, processes, report)


def _tend_worker(worker: Kept, progress: Progress, idle_unload: float, report: Callable[[str], None]) -> None:
    """Have a worker where there is work, and none where there has been none for a while."""
    if 0 < idle_unload < time.monotonic() - progress.worked and not progress.busy:
        worker.stop()
    elif ended := worker.tend(start=progress.busy):
        report(ended)


def _explain(device: Device, processes: _Processes, report: Callable[[str], None]) -> None:
    """Say once why the server is not reached, or does not let this node in, and what to mend.

    Raises:
        ConfigError: somebody else takes part with this bundle.
    """
    progress = processes.progress
    while progress.news:
        report(progress.news.pop(0))
    for finding in (processes.texts.found() if processes.texts else None) or ():
        # A run may name other columns than those that were looked for.
        report(
            f"data: {finding.sentence}" + ("" if finding.good else " (for --text and --label as given here)")
        )
    if progress.connected and not progress.attempts:
        processes.presence.note()
        processes.network.reset()
        processes.told = ()
        return
    restarted = processes.supernode.restarts > 0 and not progress.connected
    if progress.refused or progress.attempts or restarted:
        processes.network.begin()
    if (found := processes.network.found()) is None:
        return
    told = tuple(f"{finding.name}: {finding.sentence}" for finding in found if not finding.good)
    if progress.refused and not told:
        if not processes.presence.recent():
            raise ConfigError(_taken(device.bundle))
        told = ("the server still counts this node's last connection; it lets the node in within a minute",)
    for sentence in told:
        if sentence not in processes.told:
            report(sentence)
    processes.told = told


def _taken(bundle: Bundle) -> str:
    return (
        f"node {bundle.node} is connected to {bundle.server} already: another client takes part with a copy "
        "of this bundle; stop it, or make a bundle for this device, on the server: fedllm provision DIR "
        "--add-node (a device that has just lost its --state can start again in a minute)"
    )


def _line(device: Device, processes: _Processes, reason: str | None) -> str:
    progress = processes.progress
    doing = f"paused {reason}" if reason and not progress.busy else _doing(processes)
    pid = processes.worker.pid
    # In steps of 0.1 GB, so that a log is not filled with every breath of the allocator.
    held = f"worker {resident_bytes(pid) / 1e9:.1f} GB" if pid is not None else "no worker"
    parts = [
        f"node {device.bundle.node} of {device.bundle.server}",
        doing,
        f"{progress.answers} answers",
        held,
    ]
    if restarts := processes.worker.restarts + processes.supernode.restarts:
        parts.append(f"{restarts} restarts")
    return " | ".join(parts)


def _doing(processes: _Processes) -> str:
    """Say what the device does, or what keeps it from that."""
    progress = processes.progress
    if progress.busy:
        return progress.doing
    if not progress.connected or progress.attempts:
        return "; ".join(("cannot connect", *processes.told)) if processes.told else "connecting"
    return progress.trouble or progress.doing


def _prepare(device: Device, worker_socket: Path, log: logging.Logger) -> _Processes:
    progress = Progress()
    node = device.state / "node.toml"
    facts: dict[str, str | int] = {
        "partition-id": device.bundle.node,
        "state-dir": str(device.state.resolve()),
        "worker-socket": str(worker_socket),
        "keep-runs": device.bounds.runs,
        "state-limit": device.bounds.bytes,
        "secure-only": device.secure_only,
    }
    if not device.insecure:
        facts["bundle"] = str(device.bundle.folder)
    if device.peers is not None:
        facts["peers"] = str(device.peers.resolve())
    if device.memory is not None:
        facts["memory"] = device.memory
    if device.data is not None:
        facts["data"] = str(device.data.resolve())
    node.write_text(tomli_w.dumps(facts), encoding="utf-8")
    worker_command = _worker_command(device, worker_socket)
    worker = Kept("worker", lambda: Child(worker_command, _threads(device), log, private=True))
    environment = {
        "FLWR_HOME": str(device.state.resolve() / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # What Flower prints of messages is read here: the worker is started by it.
        "FLWR_LOG_LEVEL": "INFO",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Buffers of messages go back to the system when they are freed; glibc would keep them for the next.
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        # What runs here talks to its neighbour directly, whatever proxy leads to the server.
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1"))),
    }
    command = _supernode_command(device, node)
    supernode = Kept(
        "connection",
        lambda: Child([*command, "--port", str(_free_port())], environment, log, progress.read, private=True),
    )
    network = Background(lambda: try_network(device.bundle, insecure=device.insecure))
    data, text, label = device.data, device.text, device.label
    texts = None if data is None else Background(lambda: try_texts(data, text, label))
    return _Processes(worker, supernode, progress, Presence(device.state), network, texts)


def _worker_command(device: Device, worker_socket: Path) -> list[str]:
    limit = [] if device.memory is None else ["--memory", str(device.memory)]
    return [sys.executable, "-m", "client.resident", "--socket", str(worker_socket), *limit]


def _supernode_command(device: Device, node: Path) -> list[str]:
    bundle = device.bundle
    keys = ("--root-certificates", str(bundle.authority), "--auth-supernode-private-key", str(bundle.key))
    return [
        *(sys.executable, "-m", "client.device.supernode", "--superlink", bundle.server),
        *(["--insecure"] if device.insecure else keys),
        *("--node-config", str(node)),
        *(part for app in device.apps for part in ("--app", app)),
    ]


def _threads(device: Device) -> dict[str, str]:
    if device.threads is None:
        return {}
    number = str(device.threads)
    return {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "OPENBLAS_NUM_THREADS": number}


def _make_private(state: Path) -> None:
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        state.chmod(0o700)  # a folder that was there may be open to others
    except PermissionError as error:
        raise ConfigError(f"{state} belongs to another user; choose another --state") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
