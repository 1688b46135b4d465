"""What can keep a device from taking part, found before it joins: each finding says what to mend."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self

import httpx
import psutil
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedllm.config import DataConfig
from fedllm.errors import ConfigError, DataError
from fedllm.reading import read_rows

__all__ = ["Bundle", "Finding", "check"]

TIMEOUT_SECONDS = 10.0
LEAST_DISK = 1 << 30
LEAST_MEMORY = 1 << 30
MOST_AHEAD, MOST_BEHIND = 5.0, 300.0
"""Seconds by which Flower lets a device's clock be ahead of or behind the server's."""


class Bundle(NamedTuple):
    """What ``fedllm provision`` made for one node."""

    folder: Path
    server: str
    node: int

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
            bundle = cls(folder.resolve(), str(document["server"]), int(document["node"]))
            bundle.host_and_port  # noqa: B018  # read for the error it raises
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{folder} is no bundle: {error}; copy bundles/node-N from the server's folder, whole"
            ) from error
        for path in (bundle.authority, bundle.key):
            if not path.is_file():
                raise ConfigError(f"{path} is missing; copy bundles/node-N from the server's folder, whole")
        return bundle


class Finding(NamedTuple):
    """The result of one check; a ``sentence`` that is not ``good`` says what to mend."""

    name: str
    good: bool
    sentence: str


def check(
    bundle: Bundle,
    *,
    state: Path,
    data: Path | None = None,
    text: str = "text",
    label: str | None = "label",
    memory: int | None = None,
) -> list[Finding]:
    """Test everything that joining needs, without joining.

    Args:
        bundle: what the node was given.
        state: folder of the node's durable state; need not exist yet.
        data: the node's own texts, if it has any.
        text: column of the texts.
        label: column of their classes; None where there is none.
        memory: bytes that the worker will be allowed.

    Returns:
        One finding per check, in the order in which one would mend them.
    """
    return [
        *_network(bundle),
        _disk(state),
        _memory(memory),
        *([] if data is None else [_data(data, text, label)]),
    ]


def _network(bundle: Bundle) -> Iterator[Finding]:
    """Server, certificate, clock and key, as far as each can be tested; the key's file can be in any case."""
    server = _server(bundle)
    yield server
    reachable = server.good
    if reachable:
        certificate = _certificate(bundle)
        yield certificate
        reachable = certificate.good
    if reachable:
        yield _clock(bundle)
    key = _load_key(bundle)
    if isinstance(key, Finding):
        yield key
    elif reachable:
        yield _registered(bundle, key)


def _server(bundle: Bundle) -> Finding:
    host, port = bundle.host_and_port
    try:
        with socket.create_connection((host, port), TIMEOUT_SECONDS):
            return Finding("server", True, f"{bundle.server} answers")
    except socket.gaierror:
        mend = f"the name {host} is unknown here; check the network, or the server field of bundle.toml"
    except TimeoutError:
        mend = f"{bundle.server} does not answer; is TCP port {port} open in its firewall, and the way there?"
    except ConnectionRefusedError:
        mend = f"{host} is up but nothing listens on port {port}; start it with: fedllm server DIR"
    except OSError as error:
        mend = f"{bundle.server} cannot be reached: {error.strerror or error}"
    return Finding("server", False, mend)


def _certificate(bundle: Bundle) -> Finding:
    host, port = bundle.host_and_port
    context = ssl.create_default_context(cafile=bundle.authority)
    try:
        with (
            socket.create_connection((host, port), TIMEOUT_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=host) as secured,
        ):
            described = secured.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        return Finding("certificate", False, _mend_certificate(host, error))
    except (ssl.SSLError, OSError) as error:
        mend = f"{bundle.server} speaks no TLS ({error}); is it another service, or started with --insecure?"
        return Finding("certificate", False, mend)
    until = str(described["notAfter"])
    days = (ssl.cert_time_to_seconds(until) - datetime.now(UTC).timestamp()) / 86400
    sentence = f"valid for {days:.0f} more days"
    return Finding(
        "certificate",
        True,
        sentence if days > 30 else f"{sentence}; renew it soon: fedllm provision DIR --renew",
    )


def _mend_certificate(host: str, error: ssl.SSLCertVerificationError) -> str:
    # Codes of X509_verify_cert(3).
    if error.verify_code == 9:
        return f"not yet valid by this device's clock, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; set the clock"
    if error.verify_code == 10:
        return "expired; on the server: fedllm provision DIR --renew (or this device's clock is far ahead)"
    if error.verify_code in (62, 64):
        return f"made for another name than {host}; provision with --server {host}, or correct bundle.toml"
    return (
        f"not from this bundle's authority ({error.verify_message}); the bundle belongs to another federation"
    )


def _clock(bundle: Bundle) -> Finding:
    try:
        answer = httpx.get(
            f"https://{bundle.server}/health",
            verify=ssl.create_default_context(cafile=bundle.authority),
            timeout=TIMEOUT_SECONDS,
        )
        theirs = parsedate_to_datetime(answer.headers["date"])
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Finding("clock", False, f"the server's time cannot be read ({error}); is it a fedllm server?")
    ahead = (datetime.now(UTC) - theirs).total_seconds()
    # The header has whole seconds, rounded down.
    if -MOST_BEHIND < ahead < MOST_AHEAD:
        return Finding("clock", True, "agrees with the server's")
    side = "ahead of" if ahead > 0 else "behind"
    mend = (
        f"{abs(ahead):.0f} s {side} the server's; it refuses such signatures. Run: timedatectl set-ntp true"
    )
    return Finding("clock", False, mend)


def _load_key(bundle: Bundle) -> ec.EllipticCurvePrivateKey | Finding:
    mode = stat.S_IMODE(bundle.key.stat().st_mode)
    if mode & 0o077:
        return Finding("key", False, f"{bundle.key} can be read by others; run: chmod 600 {bundle.key}")
    try:
        key = load_ssh_private_key(bundle.key.read_bytes(), password=None)
    except (ValueError, UnsupportedAlgorithm, OSError) as error:
        return Finding("key", False, f"{bundle.key} cannot be read ({error}); copy the bundle again")
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return Finding(
            "key", False, f"{bundle.key} is not the key that fedllm provision made; copy the bundle again"
        )
    return key


def _registered(bundle: Bundle, key: ec.EllipticCurvePrivateKey) -> Finding:
    """Ask with a heartbeat interval that Flower refuses - but only once it knows the key."""
    public = key.public_key()
    request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0.0)
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, public),
    ]
    try:
        with FleetHttpClient.from_server_address(
            bundle.server, False, bundle.authority.read_bytes(), interceptors
        ) as client:
            client.ActivateNode(request)
    except httpx.HTTPStatusError as error:
        refusal = FlowerError.from_json(error.response.text)
        code = None if refusal is None else refusal.code
        if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
            return Finding("key", True, f"the server knows node {bundle.node}")
        if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            mend = (
                f"the server does not know this key: node {bundle.node} was revoked, or never belonged to it"
            )
            return Finding("key", False, mend)
        mend = f"the server answers with status {error.response.status_code}; is it a fedllm server?"
        return Finding("key", False, mend)
    except httpx.HTTPError as error:
        return Finding("key", False, f"the server did not say whether it knows this key ({error}); try again")
    return Finding("key", True, f"the server knows node {bundle.node}")


def _disk(state: Path) -> Finding:
    there = next(path for path in (state, *state.resolve().parents) if path.exists())
    if not os.access(there, os.W_OK):
        return Finding("disk", False, f"{there} cannot be written; choose another folder with --state")
    free = shutil.disk_usage(there).free
    if free < LEAST_DISK:
        return Finding(
            "disk",
            False,
            f"{free / 1e9:.1f} GB free at {there}, {LEAST_DISK / 1e9:.1f} needed; free some or use --state",
        )
    return Finding("disk", True, f"{free / 1e9:.1f} GB free")


def _memory(limit: int | None) -> Finding:
    available = psutil.virtual_memory().available
    wanted = LEAST_MEMORY if limit is None else limit
    if available < wanted:
        mend = (
            f"{available / 1e9:.1f} GB available, {wanted / 1e9:.1f} wanted; close programs or lower --memory"
        )
        return Finding("memory", False, mend)
    if wanted < LEAST_MEMORY:
        return Finding(
            "memory", False, f"--memory is below {LEAST_MEMORY / 1e9:.1f} GB, less than torch itself needs"
        )
    return Finding("memory", True, f"{available / 1e9:.1f} GB available")


def _data(path: Path, text: str, label: str | None) -> Finding:
    config = DataConfig.model_validate({"path": str(path), "text": text, "label": label})
    try:
        rows = list(islice(read_rows(config), 1000))
    except (DataError, OSError) as error:
        return Finding("data", False, str(error))
    if not rows:
        return Finding("data", False, f"{path} holds no rows")
    for column in (text, *([] if label is None else [label])):
        for row in rows:
            if row.columns.get(column) is None:
                there = ", ".join(map(str, row.columns))
                return Finding("data", False, f"{row.where}: no column {column!r}; there are {there}")
    more = "at least " if len(rows) == 1000 else ""
    return Finding("data", True, f"{more}{len(rows)} rows with what is needed")
