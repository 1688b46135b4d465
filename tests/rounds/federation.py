"""Whole runs on a tiny model, with a grid whose messages can be lost or altered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from client.node import CONFIG_KEY, FOLDER_KEY
from fedllm.config import RunConfig
from fedllm.runs.writer import RunStore
from server.rounds.conduct import Transport, conduct
from simulations.engines.loopback import LoopbackGrid, loopback
from strategies.base import Method
from strategies.session import forget_sessions

Fault = Callable[[Message], Message | None]
"""Takes a client's reply; returns what reaches the server, or nothing."""


class FaultyGrid(LoopbackGrid):
    """A loopback grid between whose clients and server something happens to replies."""

    fault: Fault

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the next reply that is not lost: silence is what follows when there is no other."""
        wanted = set(message_ids)
        while self._queue:
            passed = [self.fault(reply) for reply in super().pull_messages(wanted)]
            if found := [reply for reply in passed if reply is not None]:
                return found
        return []


class DeviceGrid(FaultyGrid):
    """Clients that share nothing: each has a state folder of its own, as a device has."""

    def context(self, node: int) -> Context:
        context = super().context(node)
        state = Path(context.run_config[FOLDER_KEY]).parent / "devices" / str(node)
        context.node_config["state-dir"] = str(state)
        return context


def configuration(encoder: Path, texts: Path, **sections: Any) -> RunConfig:
    """Six clients, three a round, five rounds of two short steps."""
    sections.setdefault("tuning", {"rank": 2, "alpha": 4.0, "targets": ("query", "value")})
    sections.setdefault("training", {"local_steps": 2, "batch_size": 8, "learning_rate": 5e-2})
    sections.setdefault("server", {"sample": 3})
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "clients": 6,
            "rounds": 5,
            "model": {"name": str(encoder)},
            "data": {"path": str(texts), "max_length": 16},
            **sections,
        }
    )


def let_measure(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> None:
    """Let the server measure these accuracies, one after the other."""
    values = iter(accuracies)
    monkeypatch.setattr(Method, "score", lambda self, model, test: {"accuracy": next(values)})


class Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


def cut(config: RunConfig, folder: Path, number: int) -> None:
    """Conduct a run until it is killed as it would write down a round, and forget what the process knew."""
    commit = RunStore.round

    def killed(store: RunStore, record: Any, *given: Any) -> None:
        if record.round == number:
            raise Killed
        commit(store, record, *given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunStore, "round", killed)
        with pytest.raises(Killed):
            run(config, folder)
    forget_sessions()


def run(
    config: RunConfig,
    folder: Path,
    fault: Fault = lambda reply: reply,
    grid_of: type[FaultyGrid] = FaultyGrid,
    transport: Transport | None = None,
) -> dict[str, Any]:
    """Conduct a run, or continue the one in the folder."""
    run_config = {CONFIG_KEY: config.to_json(), FOLDER_KEY: str(folder)}
    with loopback(config.clients, run_config):
        grid = grid_of(config.clients, run_config, None)
        grid.fault = fault  # type: ignore[method-assign,assignment]
        return conduct(grid, config, folder, transport=transport)
