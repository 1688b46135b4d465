"""Keys and certificates of a federation: made once on the server, handed out as one bundle per node.

    DIR/
      federation.toml            host, port, the next node number
      ca.pem  ca-key.pem         the federation's own certificate authority
      server.pem  server-key.pem what the SuperLink shows to nodes
      signing.pem signing-key.pem what signs the rounds of runs (Ed25519); stays when the server's is renewed
      nodes/node-0.pub ...       public keys of the nodes that may join
      revoked/node-3.pub ...     public keys of those that no longer may
      bundles/node-0/ ...        bundle.toml, ca.pem, node.key, node.pem (certifies it): copied to the device,
                                 then deleted here

Private keys are written with mode 0600 and never shown; a node's private key stands in its bundle only.
"""

from __future__ import annotations

import ipaddress
import shutil
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.certificates import CERTIFICATE, subject
from fedllm.errors import ConfigError
from fedllm.protocol.seals import seal
from fedllm.runs.durable import disk_errors, replace_file, write_private
from fedllm.runs.provenance.chain import Signer, own_signer

__all__ = [
    "Federation",
    "add_node",
    "address_of",
    "authority",
    "certify",
    "provision",
    "read",
    "renew",
    "revoke",
    "signer",
]

Rest = ParamSpec("Rest")
Result = TypeVar("Result")

CA_DAYS = 3650
SERVER_DAYS = 825
# A device that boots without network time may be hours behind; its clock must not void a fresh certificate.
BACKDATED = timedelta(days=1)


class Federation(NamedTuple):
    """A provisioned folder as read from disk.

    Attributes:
        folder: where keys and certificates lie.
        host: name or address under which nodes reach the server.
        port: the SuperLink's only port.
        nodes: public key file by node number, of the nodes that may join.
        revoked: the same of those that no longer may.
    """

    folder: Path
    host: str
    port: int
    nodes: dict[int, Path]
    revoked: dict[int, Path]


def _on_disk(act: Callable[Concatenate[Path, Rest], Result]) -> Callable[Concatenate[Path, Rest], Result]:
    """Let a folder that cannot be written, or a full disk, end in one sentence."""

    @wraps(act)
    def guarded(folder: Path, /, *rest: Rest.args, **named: Rest.kwargs) -> Result:
        with disk_errors(folder):
            return act(folder, *rest, **named)

    return guarded


@_on_disk
def provision(folder: Path, host: str, nodes: int, *, port: int = 8000) -> list[Path]:
    """Make a certificate authority, a server certificate for ``host`` and ``nodes`` bundles.

    Args:
        folder: created; must not hold a federation yet.
        host: DNS name or IP address that devices will dial; localhost always works too.
        nodes: number of nodes, at least 1.
        port: TCP port of the SuperLink.

    Returns:
        The bundle folders, in node order.

    Raises:
        ConfigError: the folder is in use, or an argument is out of range.
    """
    if nodes < 1:
        raise ConfigError(f"--nodes = {nodes}: a federation needs at least one node")
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port = {port}: a TCP port lies between 1 and 65535")
    name = _subject_name(host)
    if (folder / "federation.toml").exists():
        raise ConfigError(f"{folder} already holds a federation; use --add-node for one node more")
    if (folder / "ca-key.pem").exists():
        # Never replaced: it may be the authority of devices that are out there.
        raise ConfigError(
            f"{folder} holds a ca-key.pem but no federation.toml: if an interrupted provision left it, "
            "remove the folder and provision again; if federation.toml was lost, put it back"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = ec.generate_private_key(ec.SECP384R1())
    certificate = _certify_authority(authority)
    write_private(folder / "ca-key.pem", _pem(authority))
    (folder / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    _issue_server(folder, name)
    signer(folder)
    _write_federation(folder, {"host": host, "port": port, "next_node": 0})
    return [add_node(folder) for _ in range(nodes)]


@_on_disk
def add_node(folder: Path) -> Path:
    """Make one more key pair and bundle; a number is never given twice. Returns the bundle folder."""
    document = _document(folder)
    number = int(document["next_node"])
    key = ec.generate_private_key(ec.SECP384R1())
    bundle = folder / "bundles" / f"node-{number}"
    if bundle.exists():  # an interrupted call began it, and gave its number to nobody
        shutil.rmtree(bundle)
    authority = _kept(folder / "ca.pem")
    certificate = _certify_own(folder, subject(number), key.public_key())
    bundle.mkdir(parents=True, mode=0o700)
    write_private(bundle / "node.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (bundle / "ca.pem").write_bytes(authority)
    (bundle / CERTIFICATE).write_bytes(certificate)
    description = {
        "server": address_of(document["host"], document["port"]),
        "node": number,
        "seal": seal(number, key.public_key()),
    }
    (bundle / "bundle.toml").write_text(tomli_w.dumps(description), encoding="utf-8")
    public = folder / "nodes" / f"node-{number}.pub"
    public.parent.mkdir(exist_ok=True)
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    _write_federation(folder, {**document, "next_node": number + 1})
    return bundle


@_on_disk
def signer(folder: Path) -> Signer:
    """Return what signs the rounds of a federation's runs; made where an older fedllm provisioned it."""
    found, shown = own_signer(folder), folder / "signing.pem"
    if not shown.exists():
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedllm rounds")])
        replace_file(shown, _certify_own(folder, name, found.key.public_key()))
    return Signer(found.key, shown.read_text())


def authority(folder: Path) -> x509.Certificate:
    """Return the certificate of a federation's authority, by which nodes and what they sign are known."""
    try:
        return x509.load_pem_x509_certificate(_kept(folder / "ca.pem"))
    except ValueError as error:
        raise ConfigError(f"{folder / 'ca.pem'} is no certificate: {error}; put it back") from error


def _certify_own(folder: Path, name: x509.Name, key: ec.EllipticCurvePublicKey | Ed25519PublicKey) -> bytes:
    """Return the authority's word, as PEM, for whose key one is that signs."""
    authority, signs = _authority(folder)
    builder = _builder(name, authority.subject, key, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    return builder.sign(signs, hashes.SHA384()).public_bytes(Encoding.PEM)


@_on_disk
def revoke(folder: Path, node: int) -> None:
    """Forbid a node to join; a running server drops it as soon as it sees the change."""
    federation = read(folder)
    if node not in federation.nodes:
        known = ", ".join(map(str, sorted(federation.nodes))) or "none"
        raise ConfigError(f"--revoke {node}: no such node in {folder}; its nodes are {known}")
    target = folder / "revoked" / f"node-{node}.pub"
    target.parent.mkdir(exist_ok=True)
    federation.nodes[node].replace(target)


@_on_disk
def renew(folder: Path) -> datetime:
    """Issue a new server certificate from the same authority; bundles stay valid. Returns its last moment."""
    document = _document(folder)
    also = [_subject_name(name) for name in document.get("also", [])]
    return _issue_server(folder, _subject_name(document["host"]), *also).not_valid_after_utc


@_on_disk
def certify(folder: Path, address: str) -> bool:
    """Make the server's certificate good for one more name or address; returns whether it was not.

    Issued by the same authority, so that bundles stay valid.
    """
    name = _subject_name(address)
    certificate = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if name in named:
        return False
    document = _document(folder)
    also = [*document.get("also", []), address]
    _write_federation(folder, {**document, "also": also})
    renew(folder)
    return True


def read(folder: Path) -> Federation:
    """Read a provisioned folder; raises ``ConfigError`` where there is none."""
    document = _document(folder)
    return Federation(
        folder,
        str(document["host"]),
        int(document["port"]),
        _public_keys(folder / "nodes"),
        _public_keys(folder / "revoked"),
    )


def _public_keys(folder: Path) -> dict[int, Path]:
    return {int(path.stem.removeprefix("node-")): path for path in sorted(folder.glob("node-*.pub"))}


def _document(folder: Path) -> dict[str, Any]:
    path = folder / "federation.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} holds no federation; make one with: fedllm provision {folder}"
        ) from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _write_federation(folder: Path, document: dict[str, Any]) -> None:
    draft = folder / "federation.toml.new"
    draft.write_text(tomli_w.dumps(document), encoding="utf-8")
    draft.replace(folder / "federation.toml")


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def address_of(host: str, port: int) -> str:
    """Return host and port as one text; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _subject_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removesuffix(".").split(".")
    if not all(label and label.isascii() and label.replace("-", "").isalnum() for label in labels):
        raise ConfigError(
            f"--server {host!r} is neither a host name nor an IP address (give no scheme and no port)"
        )
    return x509.DNSName(host)


def _certify_authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedllm federation")])
    public = key.public_key()
    builder = _builder(name, name, public, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    return builder.sign(key, hashes.SHA384())


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Read the federation's certificate authority and its key."""
    shown, kept = _kept(folder / "ca.pem"), _kept(folder / "ca-key.pem")
    try:
        certificate = x509.load_pem_x509_certificate(shown)
        key = load_pem_private_key(kept, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ValueError("key and certificate are no pair")
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{folder}: ca.pem and ca-key.pem are not the federation's authority ({error}); "
            "put them back from a backup"
        ) from error
    return certificate, key


def _kept(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing: without the federation's authority nothing can be issued; put it back from "
            "a backup, or provision a new federation and hand out its bundles"
        ) from error


def _issue_server(folder: Path, *hosts: x509.GeneralName) -> x509.Certificate:
    """Write a new server key and certificate, each in one step so that a reader never sees half a file."""
    authority, signer = _authority(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key()
    local: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    names = [*local, *(host for host in hosts if host not in local)]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedllm server")])
    builder = _builder(subject, authority.subject, public, SERVER_DAYS)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    certificate = builder.sign(signer, hashes.SHA384())
    draft = folder / "server-key.pem.new"
    draft.unlink(missing_ok=True)
    write_private(draft, _pem(key))
    draft.replace(folder / "server-key.pem")
    (folder / "server.pem.new").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "server.pem.new").replace(folder / "server.pem")
    return certificate


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey | Ed25519PublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
