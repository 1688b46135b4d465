"""What the operator asks of a run: obeyed between rounds, and wherever the engine waits for clients."""

from __future__ import annotations

from fedllm.runs.writer import RunStore
from server.rounds.roster import Roster

__all__ = ["Orders"]


class Orders:
    """Takes the operator's commands from the run's store.

    Args:
        store: where commands lie, and where it is noted that they were obeyed.
        roster: clients are set aside here, and taken back.

    Attributes:
        stop: whether the run is to end, resumable.
        paused: whether it is to wait.
    """

    def __init__(self, store: RunStore, roster: Roster) -> None:
        self._store, self._roster = store, roster
        self.stop = False
        self.paused = False

    def obey(self) -> None:
        """Take in what has been asked for since the last look."""
        for command in self._store.take_commands():
            node = command.arguments.get("node")
            if command.kind == "stop":
                self.stop = True
            elif command.kind in ("pause", "resume"):
                self.paused = command.kind == "pause"
                self._store.phase("paused" if self.paused else "resumed")
            elif command.kind == "quarantine" and isinstance(node, int):
                self._roster.quarantined.add(node)
            elif command.kind == "release" and isinstance(node, int):
                self._roster.quarantined.discard(node)
            self._store.event(command.kind, f"{command.by} asked for {command.kind}", **command.arguments)
