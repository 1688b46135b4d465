"""The federation that is served beside the dashboard: its nodes, their keys, its runs as Flower has them."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import httpx

from fedllm.errors import FedllmError
from server.federation.control import read_public_key
from server.federation.link import connect
from server.federation.provision import read, revoke
from server.federation.submit import log_of, numbers

__all__ = ["FederationNode", "ended", "log_of", "nodes", "revoke_node"]


@dataclass(frozen=True)
class FederationNode:
    """A node that was provisioned.

    Attributes:
        node: its number.
        status: ``online``, ``offline``, ``registered`` (never seen), ``revoked``, or ``unknown`` while the
            server cannot be asked.
        fingerprint: of its public key: the first 16 bytes of SHA-256, in hex.
    """

    node: int
    status: str
    fingerprint: str


def nodes(folder: Path) -> list[FederationNode]:
    """List a federation's nodes, in order."""
    federation = read(folder)
    states = _states(folder)
    found = []
    for revoked, held in ((False, federation.nodes), (True, federation.revoked)):
        for number, path in held.items():
            key = read_public_key(path)
            status = "revoked" if revoked else states.get(key, "registered" if states else "unknown")
            found.append(FederationNode(number, status, hashlib.sha256(key).hexdigest()[:32]))
    return sorted(found, key=lambda row: row.node)


def _states(folder: Path) -> dict[bytes, str]:
    with contextlib.suppress(httpx.HTTPError, FedllmError), connect(folder) as control:
        return {row.public_key: row.status for row in control.nodes()}
    return {}


def revoke_node(folder: Path, node: int) -> None:
    """Forbid a node to join, and delete the keys that were made for it."""
    revoke(folder, node)
    shutil.rmtree(folder / "bundles" / f"node-{node}", ignore_errors=True)


def ended(folder: Path, run: str) -> bool:
    """Whether a run that was submitted has ended; False while the server cannot be asked."""
    with contextlib.suppress(httpx.HTTPError, FedllmError, KeyError), connect(folder) as control:
        return control.run(numbers(folder)[run][-1]).status == "finished"
    return False
