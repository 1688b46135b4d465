"""What ``fedllm provision`` made for one node. A device reads it without loading anything of Flower's."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple, Self

from fedllm.errors import ConfigError

__all__ = ["Bundle"]


class Bundle(NamedTuple):
    """What ``fedllm provision`` made for one node."""

    folder: Path
    server: str
    node: int
    seal: str = ""

    @property
    def authority(self) -> Path:
        """PEM file of the federation's certificate authority."""
        return self.folder / "ca.pem"

    @property
    def key(self) -> Path:
        """The node's private key."""
        return self.folder / "node.key"

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Where the server listens."""
        host, _, port = self.server.rpartition(":")
        return host.strip("[]"), int(port)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a bundle folder; raises ``ConfigError`` where something of it is missing."""
        try:
            document = tomllib.loads((folder / "bundle.toml").read_text(encoding="utf-8"))
            node, seal = document["node"], str(document.get("seal", ""))
            if not isinstance(node, int) or isinstance(node, bool) or node < 0:
                raise ValueError(f"node = {node!r} in bundle.toml is not the number of a node")
            bundle = cls(folder.resolve(), str(document["server"]), node, seal)
            bundle.host_and_port  # noqa: B018  # read for the error it raises
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{folder} is no bundle: {_told(error)}; copy bundles/node-N from the server's folder, whole"
            ) from error
        for path in (bundle.authority, bundle.key):
            if not path.is_file():
                raise ConfigError(f"{path} is missing; copy bundles/node-N from the server's folder, whole")
        return bundle


def _told(error: OSError | KeyError | ValueError) -> str:
    """Say what is wrong with ``bundle.toml``."""
    if isinstance(error, OSError):
        return f"bundle.toml cannot be read ({error.strerror})"
    if isinstance(error, KeyError):
        return f"bundle.toml does not say its {error.args[0]}"
    return str(error)
