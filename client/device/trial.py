"""What a device tests, in a process of its own, which ends and gives its memory back.

``python -m client.device.trial`` reads what is to be tested as JSON from standard input and writes findings
as JSON.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.device.bundle import Bundle
from client.device.checks import Finding, check_network, check_texts
from fedllm.errors import DataError, FedllmError
from fedllm.host.processes import die_with_parent

__all__ = ["try_network", "try_run", "try_texts"]

LONGEST_SECONDS = 600.0
"""A library that runs out of memory may wait for ever instead of saying so."""


def try_network(bundle: Bundle, *, insecure: bool) -> list[Finding]:
    """Test whether the server is reached and knows this node: :func:`client.device.checks.check_network`."""
    return _elsewhere({"kind": "network", "bundle": list(map(str, bundle)), "insecure": insecure})


def try_texts(path: Path, text: str, label: str | None) -> list[Finding]:
    """Read a device's texts to their end; see :func:`client.device.checks.check_texts`."""
    return _elsewhere({"kind": "texts", "path": str(path.resolve()), "text": text, "label": label})


def try_run(source: str, node: int, data: Path | None, memory: int | None) -> list[Finding]:
    """Load a run's model and this device's texts and train a few steps, within the memory that it may take.

    Args:
        source: the run's preset or TOML file.
        node: this node's number.
        data: the node's own texts; None takes its part of those that the run names.
        memory: bytes that the worker will be allowed.
    """
    own = "" if data is None else str(data.resolve())
    return _elsewhere({"kind": "run", "source": source, "node": node, "data": own, "memory": memory})


def _elsewhere(asked: dict[str, Any]) -> list[Finding]:
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "client.device.trial"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LONGEST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        sentence = f"the trial did not end within {LONGEST_SECONDS:.0f} s"
        return [Finding(str(asked["kind"]), False, sentence)]
    try:
        return [Finding(*found) for found in json.loads(ended.stdout.splitlines()[-1])]
    except (IndexError, ValueError):
        if ended.returncode == -9:
            return [Finding("memory", False, "the system ended the trial, most likely for want of memory")]
        words = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
        # A library that gets no memory may end its process in words of its own.
        limited = "; --memory may be too little for this run" if asked.get("memory") else ""
        return [Finding(str(asked["kind"]), False, f"the trial ended without an answer: {words}{limited}")]


def _network(bundle: list[str], insecure: bool) -> list[Finding]:
    folder, server, node, seal = bundle
    return list(check_network(Bundle(Path(folder), server, int(node), seal), insecure=insecure))


def _texts(path: str, text: str, label: str | None) -> list[Finding]:
    return [check_texts(Path(path), text, label)]


def _run(source: str, node: int, data: str, memory: int | None) -> list[Finding]:
    import client.worker  # noqa: F401  # the limit begins, as a worker's does, once this is loaded
    from client.resident import limit_memory
    from fedllm.host.resources import peak_rss_bytes
    from fedllm.presets import document
    from fedllm.tasks import with_classes
    from strategies.registry import resolve_run
    from strategies.session import open_session

    config, unknown = resolve_run(document(source)), ""
    if data:
        try:
            config = with_classes(config)
        except DataError:  # the server's own texts lie with the server
            unknown = "; its classes are not known here"
    if memory is not None:
        limit_memory(memory)
    session = open_session(config.to_json(), data)
    train, test = session.client_tokens(node)
    session.method.try_out(session.model, train.batch(range(min(len(train), config.training.batch_size))))
    held_out = f" and {len(test)} to test on" if len(test) else ""
    took = f"a few steps took {peak_rss_bytes() / 1e9:.2f} GB"
    return [Finding("run", True, f"{config.name}: {len(train)} texts to train on{held_out}{unknown}; {took}")]


_KINDS: dict[str, Callable[..., list[Finding]]] = {"network": _network, "texts": _texts, "run": _run}


def _tried(asked: dict[str, Any]) -> list[Finding]:
    kind = asked.pop("kind")
    try:
        return _KINDS[kind](**asked)
    except (FedllmError, MemoryError, RuntimeError, OSError, ImportError) as error:
        if _lacks_memory(error):
            limit = asked.get("memory")
            allowed = "this device has" if limit is None else f"--memory allows, {limit / 1e9:.2f} GB"
            return [Finding("memory", False, f"the run needs more than {allowed}")]
        if not isinstance(error, FedllmError):
            raise
        # What runs out of memory at an odd place says so in odd ways.
        within = f" (within --memory, {asked['memory'] / 1e9:.2f} GB)" if asked.get("memory") else ""
        return [Finding("data" if isinstance(error, DataError) else kind, False, f"{error}{within}")]


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether memory was what an error began with; libraries word that in ways of their own."""
    while error is not None:
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError | OSError | ImportError)
            and any(words in str(error).lower() for words in ("memory", "map segment"))
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    """Try what standard input asks for."""
    die_with_parent()
    logging.disable(logging.WARNING)
    found = _tried(json.load(sys.stdin))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
