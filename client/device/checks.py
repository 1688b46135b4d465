"""What can keep a device from taking part, found before it joins: each finding says what to mend.

What is heavy is imported by the check that needs it, so that a device that waits stays small.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from client.device.bundle import Bundle
from fedllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["Finding", "check", "check_here", "check_network", "check_peers", "check_texts"]

TIMEOUT_SECONDS = 10.0
LEAST_PEERS = 2
"""Others in a secure sum at least."""
LEAST_DISK = 1 << 30
LEAST_MEMORY = 1 << 29
MOST_AHEAD, MOST_BEHIND = 5.0, 300.0
"""Seconds by which Flower lets a device's clock be ahead of or behind the server's."""


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
    insecure: bool = False,
) -> list[Finding]:
    """Test everything that joining needs, without joining.

    Args:
        bundle: what the node was given.
        state: folder of the node's durable state; need not exist yet.
        data: the node's own texts, if it has any.
        text: column of the texts.
        label: column of their classes; None where there is none.
        memory: bytes that the worker will be allowed.
        insecure: whether the server was started without TLS and keys.

    Returns:
        One finding per check, in the order in which one would mend them.
    """
    return [
        *check_network(bundle, insecure=insecure),
        _disk(state),
        _memory(memory),
        *([] if data is None else [check_texts(data, text, label)]),
    ]


def check_here(bundle: Bundle, state: Path, memory: int | None) -> list[Finding]:
    """Test the key's file, disk and memory: what can be tested at once and alone."""
    return [_key_file(bundle), _disk(state), _memory(memory)]


def check_peers(bundle: Bundle, peers: Path | None, *, insecure: bool = False) -> Finding:
    """Test the list of those with whom a device sits in a sum; None is good as well, and takes everybody."""
    if peers is None:
        return Finding("peers", True, "whoever has a certificate of the federation")
    if insecure:
        return Finding(
            "peers", False, "--peers knows nodes by their keys, and --insecure leaves them without"
        )
    from fedllm.certificates import Holder, peers_in

    try:
        nodes = sorted(peers_in(peers, Holder.read(bundle.folder).authority))
    except ConfigError as error:
        return Finding("peers", False, str(error))
    others = [node for node in nodes if node != bundle.node]
    if len(others) < LEAST_PEERS:
        few = f"--peers {peers} names {len(others)} others, and a secure sum takes {LEAST_PEERS} at least"
        return Finding("peers", False, few)
    return Finding("peers", True, f"sums with nodes {', '.join(map(str, others))} alone")


def check_network(bundle: Bundle, *, insecure: bool = False) -> Iterator[Finding]:
    """Test server, certificate, clock and key, as far as each can be; the key's file can be in any case."""
    server = _server(bundle)
    yield server
    if insecure:
        return
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
        return
    from fedllm.protocol.seals import seal

    # Bundles of before there were seals have none.
    if bundle.seal and bundle.seal != seal(bundle.node, key.public_key()):
        mend = f"node = {bundle.node} in bundle.toml is not the number that {bundle.key.name} was made for"
        yield Finding("number", False, f"{mend}, and the server will refuse it; copy the bundle again")
    from fedllm.certificates import Holder

    try:
        Holder.read(bundle.folder)
    except ConfigError as error:
        yield Finding("signatures", False, str(error))
    if reachable:
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
    import httpx

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


def _key_file(bundle: Bundle) -> Finding:
    if stat.S_IMODE(bundle.key.stat().st_mode) & 0o077:
        return Finding("key", False, f"{bundle.key} can be read by others; run: chmod 600 {bundle.key}")
    return Finding("key", True, "can be read by its owner alone")


def _load_key(bundle: Bundle) -> ec.EllipticCurvePrivateKey | Finding:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    if not (file := _key_file(bundle)).good:
        return file
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
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

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


def check_texts(path: Path, text: str, label: str | None) -> Finding:
    """Load the texts as the worker will: what is good here does not end a run later."""
    from fedllm import tasks
    from fedllm.config import RunConfig
    from fedllm.data.corpus import load

    kind = "classification" if label else "causal"
    settings = {"data": {"path": str(path), "text": text, "label": label}, "model": {"task": kind}}
    config = RunConfig.model_validate(settings)
    try:
        corpus = load(config.data, tasks.of(config))
    except (ConfigError, DataError) as error:
        return Finding("data", False, str(error))
    classes = f" of {len(corpus.label_names)} classes: {', '.join(corpus.label_names[:10])}"
    return Finding("data", True, f"{len(corpus)} texts{classes if corpus.label_names else ''}")
