"""The one place that speaks Flower's Control API: nodes and runs of a SuperLink.

Flower's own ``flwr`` command starts a process per question and reads a configuration from the user's
home; the same requests from here take milliseconds and leave that configuration alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import ssl
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedllm.errors import FedllmError
from server.federation.tokens import TOKEN_HEADER

__all__ = ["Control", "Node", "Run", "build_bundle", "read_public_key"]


class Node(NamedTuple):
    """A node as the SuperLink sees it; ``status`` is registered, online, offline or unregistered."""

    id: int
    name: str
    status: str
    public_key: bytes


class Run(NamedTuple):
    """A run as the SuperLink sees it.

    Attributes:
        id: Flower's number of the run.
        status: starting, running or finished.
        outcome: completed, failed or stopped once it is finished, else empty.
        details: why it failed.
        bytes_down: what the SuperLink counted as sent to nodes.
        bytes_up: what it counted as received from nodes.
    """

    id: int
    status: str
    outcome: str
    details: str
    bytes_down: int
    bytes_up: int


class _Direct(ControlHttpClient):
    """Goes past any proxy that the environment names: the SuperLink is on this host."""

    def __init__(self, base_url: str, *, verify: ssl.SSLContext | bool | str = True, **options: Any) -> None:
        super().__init__(base_url, verify=verify, **options)
        timeout = self._client.timeout
        self._client.close()
        self._client = httpx.Client(verify=verify, timeout=timeout, trust_env=False)


class _Token:
    """Shows the federation's token with each request; it is read anew, as a server may just have made it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        with contextlib.suppress(FileNotFoundError):
            context.request.headers[TOKEN_HEADER] = self._path.read_text()
        return call_next(context)


class Control:
    """A connection to a SuperLink's Control API.

    Args:
        address: ``host:port``.
        authority: PEM file of the certificate authority; None speaks unencrypted HTTP.
        token: file of the token that the SuperLink asks for.
    """

    def __init__(self, address: str, authority: Path | None, token: Path) -> None:
        self.address = address
        self.trouble = ""
        """Why the SuperLink was not :meth:`ready`."""
        self._client = _Direct.from_server_address(
            address,
            authority is None,
            authority.read_bytes() if authority else None,
            [RuntimeVersionHttpInterceptor(component_name="fedllm"), _Token(token)],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ready(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            self._client.ListRuns(ListRunsRequest(limit=1))
        except (httpx.HTTPError, PermissionError) as error:
            self.trouble = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
            return False
        return True

    def nodes(self) -> list[Node]:
        """List the nodes that may join."""
        answer = self._client.ListNodes(ListNodesRequest())
        rows = [Node(item.node_id, item.name, item.status, item.public_key) for item in answer.nodes_info]
        return [row for row in rows if row.status != "unregistered"]

    def register(self, public_key: bytes, name: str) -> int:
        """Let a node join; returns the id that Flower gives it."""
        return self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id

    def unregister(self, node_id: int) -> None:
        """Let a node no longer join; it is disconnected at its next call."""
        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start(self, bundle: bytes, config: Mapping[str, str | int | float | bool]) -> int:
        """Start a run of a Flower app bundle; ``config`` overrides keys of its run configuration."""
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        return self._client.StartRun(request).run_id

    def stop(self, run_id: int) -> bool:
        """Stop a run; False where it had ended already."""
        try:
            return self._client.StopRun(StopRunRequest(run_id=run_id)).success
        except httpx.HTTPStatusError:
            if self.run(run_id).status == "finished":
                return False
            raise

    def run(self, run_id: int) -> Run:
        """Look one run up."""
        try:
            found = dict(self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict)
        except httpx.HTTPStatusError as error:
            raise FedllmError(f"{self.address} knows no run {run_id}") from error
        item = found[run_id]
        return Run(
            run_id,
            item.status.status,
            item.status.sub_status,
            item.status.details,
            item.bytes_sent,
            item.bytes_recv,
        )

    def logs(self, run_id: int) -> Iterator[str]:
        """Stream what the run's ServerApp prints, until the run ends."""
        for part in self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=0.0)):
            yield part.log_output


def build_bundle(files: Mapping[str, bytes]) -> bytes:
    """Build a Flower app bundle of files by their path in it; one of them is ``pyproject.toml``."""
    with warnings.catch_warnings():
        # Flower's own use of pathspec, which only Flower can mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        bundle, _ = build_fab_from_files(dict(files))
    return bundle


def read_public_key(path: Path) -> bytes:
    """Read an OpenSSH public key file into the form that Flower compares."""
    key = load_ssh_public_key(path.read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return public_key_to_bytes(key)
