"""Where a client works: which node it is, and where its data and its memory lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from flwr.app import ConfigRecord, Context

from client.device.collection import KEEP_RUNS
from fedllm.errors import WireError

__all__ = ["CONFIG_KEY", "FOLDER_KEY", "NodeContext"]

CONFIG_KEY, FOLDER_KEY = "fedllm", "run-dir"
"""Keys of Flower's ``run_config``: the whole configuration as JSON, and the run's folder."""


@dataclass(frozen=True)
class NodeContext:
    """A node's own circumstances; the run's configuration says the rest.

    Attributes:
        node: the client's number in the federation, from 0.
        data: path of this node's own texts; empty in a simulation, where the run's data are partitioned.
        folder: this node's durable state, of all runs.
        shared: global tensors; virtual clients of one host share it.
        keep_replies: answer a repeated instruction from the disk, as a device should.
        keep_runs, state_limit: bounds of what a device keeps of other runs: :mod:`client.device.collection`.
        memory: bytes that the worker may take; 0 leaves it to the machine.
        bundle: folder of a device's keys; empty where it has none, as in a simulation.
        secure_only: whether a device answers only where its update is masked.
        peers: file of those with whom a device sits in a sum; empty where it takes all of its federation.
    """

    node: int
    data: str
    folder: str
    shared: str
    keep_replies: bool
    keep_runs: int = KEEP_RUNS
    state_limit: int = 0
    memory: int = 0
    bundle: str = ""
    secure_only: bool = False
    peers: str = ""

    @property
    def on_device(self) -> bool:
        """Whether this is a device of its own, and no client of a simulation."""
        return self.keep_replies

    @classmethod
    def of(cls, context: Context) -> Self:
        """Read Flower's context: a device names ``state-dir`` and ``data``, a simulated client neither."""
        node = int(context.node_config.get("partition-id", 0))
        state = context.node_config.get("state-dir")
        if state is not None:
            data = str(context.node_config.get("data", ""))
            keep_runs = int(context.node_config.get("keep-runs", KEEP_RUNS))
            limit = int(context.node_config.get("state-limit", 0))
            memory = int(context.node_config.get("memory", 0))
            bundle = str(context.node_config.get("bundle", ""))
            secure_only = bool(context.node_config.get("secure-only", False))
            peers = str(context.node_config.get("peers", ""))
            return cls(
                node, data, str(state), str(state), True, keep_runs, limit, memory, bundle, secure_only, peers
            )
        clients = Path(str(context.run_config[FOLDER_KEY])) / "clients"
        return cls(node, "", str(clients / str(node)), str(clients), keep_replies=False)

    def to_record(self) -> ConfigRecord:
        """Return the place as a Flower record, for a worker process."""
        return ConfigRecord(asdict(self))

    @classmethod
    def from_record(cls, record: ConfigRecord) -> Self:
        """Invert :meth:`to_record`."""
        try:
            return cls(**dict(record))  # type: ignore[arg-type]  # written by to_record on the same machine
        except TypeError as error:
            raise WireError(f"not a place record: {error}") from error
