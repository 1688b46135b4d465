"""Where a client works: which node it is, and where its data and its memory lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from flwr.app import ConfigRecord, Context

from fedllm.errors import WireError

__all__ = ["CONFIG_KEY", "FOLDER_KEY", "Place"]

CONFIG_KEY, FOLDER_KEY = "fedllm", "run-dir"
"""Keys of Flower's ``run_config``: the whole configuration as JSON, and the run's folder."""


@dataclass(frozen=True)
class Place:
    """A node's own circumstances; the run's configuration says the rest.

    Attributes:
        node: the client's number in the federation, from 0.
        data: path of this node's own texts; empty in a simulation, where the run's data are partitioned.
        folder: this node's durable state, of all runs.
        shared: global tensors; virtual clients of one host share it.
        keep_replies: answer a repeated instruction from the disk, as a device should.
    """

    node: int
    data: str
    folder: str
    shared: str
    keep_replies: bool

    @classmethod
    def of(cls, context: Context) -> Self:
        """Read Flower's context: a device names ``state-dir`` and ``data``, a simulated client neither."""
        node = int(context.node_config.get("partition-id", 0))
        state = context.node_config.get("state-dir")
        if state is not None:
            data = str(context.node_config.get("data", ""))
            return cls(node, data, str(state), str(state), keep_replies=True)
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
