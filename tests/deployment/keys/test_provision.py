"""Keys and certificates, verified by libraries that did not make them."""

from __future__ import annotations

import socket
import ssl
import stat
import subprocess
import threading
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedllm.errors import ConfigError, StoreError
from server.federation.provision import add_node, certify, provision, read, renew, revoke


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "federation"
    provision(folder, "fed.example.org", 2, port=9443)
    return folder


def private_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]


@pytest.mark.parametrize("name", ["fed.example.org", "localhost"])
def test_certificate_verifies_against_the_authority(federation: Path, name: str) -> None:
    authority = x509.load_pem_x509_certificate((federation / "ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((federation / "server.pem").read_bytes())
    verifier = PolicyBuilder().store(Store([authority])).build_server_verifier(x509.DNSName(name))
    assert [item.subject for item in verifier.verify(server, [])] == [server.subject, authority.subject]
    stranger = PolicyBuilder().store(Store([authority])).build_server_verifier(x509.DNSName("other.org"))
    with pytest.raises(VerificationError):
        stranger.verify(server, [])


def test_openssl_accepts_the_chain(federation: Path) -> None:
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_ip", "127.0.0.1"]
    done = subprocess.run(
        [*command, "-CAfile", str(federation / "ca.pem"), str(federation / "server.pem")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def handshake(folder: Path, authority: Path, name: str) -> str | None:
    """Do one TLS handshake over a socket pair; return the protocol that was agreed on."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server-key.pem")
    client = ssl.create_default_context(cafile=authority)
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(right, server_side=True).close()
        except (ssl.SSLError, OSError):
            right.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(left, server_hostname=name) as secured:
            return secured.version()
    finally:
        left.close()
        thread.join()


@pytest.mark.parametrize("name", ["fed.example.org", "localhost", "127.0.0.1", "::1"])
def test_handshake_under_every_name(federation: Path, name: str) -> None:
    assert handshake(federation, federation / "bundles/node-0/ca.pem", name) == "TLSv1.3"


def test_handshake_refuses_another_authority_and_another_name(federation: Path, tmp_path: Path) -> None:
    provision(tmp_path / "other", "fed.example.org", 1)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(federation, tmp_path / "other/ca.pem", "fed.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(federation, federation / "ca.pem", "evil.example.org")


def test_an_ip_address_becomes_an_address_name(tmp_path: Path) -> None:
    provision(tmp_path, "192.0.2.7", 1)
    assert handshake(tmp_path, tmp_path / "ca.pem", "192.0.2.7") == "TLSv1.3"


def test_every_private_file_is_private(federation: Path) -> None:
    files = private_files(federation)
    assert {path.relative_to(federation).as_posix() for path in files} == {
        "ca-key.pem",
        "server-key.pem",
        "signing-key.pem",
        "bundles/node-0/node.key",
        "bundles/node-1/node.key",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_bundle_holds_only_what_its_node_needs(federation: Path) -> None:
    bundle = federation / "bundles/node-1"
    assert {path.name for path in bundle.iterdir()} == {"bundle.toml", "ca.pem", "node.key", "node.pem"}
    told = tomllib.loads((bundle / "bundle.toml").read_text())
    assert len(told.pop("seal")) == 32
    assert told == {"server": "fed.example.org:9443", "node": 1}
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o700


def test_keys_are_p384_pairs_all_different(federation: Path) -> None:
    seen = set()
    for number, public_file in read(federation).nodes.items():
        private = load_ssh_private_key((federation / f"bundles/node-{number}/node.key").read_bytes(), None)
        public = load_ssh_public_key(public_file.read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP384R1)
        assert private.public_key() == public
        seen.add(public_file.read_bytes())
    assert len(seen) == 2


def test_nodes_are_added_and_revoked_and_numbers_never_come_back(tmp_path: Path) -> None:
    provision(tmp_path, "localhost", 2)
    assert add_node(tmp_path).name == "node-2"
    revoke(tmp_path, 2)
    assert (sorted(read(tmp_path).nodes), sorted(read(tmp_path).revoked)) == ([0, 1], [2])
    assert add_node(tmp_path).name == "node-3"
    with pytest.raises(ConfigError, match=r"no such node.*0, 1, 3"):
        revoke(tmp_path, 2)


def test_renewal_keeps_bundles_valid(tmp_path: Path) -> None:
    provision(tmp_path, "localhost", 1)
    before = (tmp_path / "server.pem").read_bytes()
    until = renew(tmp_path)
    assert (tmp_path / "server.pem").read_bytes() != before
    assert abs(until - datetime.now(UTC) - timedelta(days=825)) < timedelta(minutes=1)
    assert stat.S_IMODE((tmp_path / "server-key.pem").stat().st_mode) == 0o600
    assert handshake(tmp_path, tmp_path / "bundles/node-0/ca.pem", "localhost") == "TLSv1.3"


def test_a_certificate_takes_in_the_address_that_the_server_listens_on(tmp_path: Path) -> None:
    """And keeps it when it is renewed; a bundle from before stays good."""
    provision(tmp_path, "fed.example.org", 1)
    assert certify(tmp_path, "192.0.2.9")
    assert not certify(tmp_path, "192.0.2.9")
    assert not certify(tmp_path, "::1")
    renew(tmp_path)
    for name in ("192.0.2.9", "fed.example.org", "localhost"):
        assert handshake(tmp_path, tmp_path / "bundles/node-0/ca.pem", name) == "TLSv1.3"


@pytest.mark.parametrize(
    ("host", "nodes", "port", "message"),
    [
        ("https://fed.org", 1, 8000, "no scheme"),
        ("fed.org:8000", 1, 8000, "no port"),
        ("", 1, 8000, "host name"),
        ("fed.org", 0, 8000, "at least one node"),
        ("fed.org", 1, 70000, "between 1 and 65535"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    tmp_path: Path, host: str, nodes: int, port: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        provision(tmp_path / "new", host, nodes, port=port)
    assert not (tmp_path / "new").exists()


def test_an_existing_federation_is_not_overwritten(federation: Path) -> None:
    before = (federation / "ca-key.pem").read_bytes()
    with pytest.raises(ConfigError, match="--add-node"):
        provision(federation, "localhost", 1)
    assert (federation / "ca-key.pem").read_bytes() == before
    with pytest.raises(ConfigError, match="fedllm provision"):
        read(federation / "nodes")


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    provision(tmp_path, "localhost", 1)
    revoke(tmp_path, 0)
    renew(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_what_an_interrupted_provision_left_is_named_and_kept(tmp_path: Path) -> None:
    provision(tmp_path, "localhost", 1)
    (tmp_path / "federation.toml").unlink()
    before = (tmp_path / "ca-key.pem").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a ca-key\.pem but no federation\.toml: .* provision again"):
        provision(tmp_path, "localhost", 1)
    assert (tmp_path / "ca-key.pem").read_bytes() == before


def test_a_bundle_that_was_begun_is_made_again(tmp_path: Path) -> None:
    provision(tmp_path, "localhost", 1)
    (tmp_path / "bundles" / "node-1").mkdir()
    (tmp_path / "bundles" / "node-1" / "node.key").write_bytes(b"half")
    bundle = add_node(tmp_path)
    assert bundle.name == "node-1"
    private = load_ssh_private_key((bundle / "node.key").read_bytes(), None)
    assert private.public_key() == load_ssh_public_key((tmp_path / "nodes" / "node-1.pub").read_bytes())


@pytest.mark.parametrize("name", ["ca-key.pem", "ca.pem"])
def test_a_missing_authority_is_named(tmp_path: Path, name: str) -> None:
    provision(tmp_path, "localhost", 1)
    kept = {path: path.read_bytes() for path in tmp_path.glob("server*.pem")}
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} is missing: .*; put it back from a backup, or provision"):
        renew(tmp_path)
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        add_node(tmp_path)
    assert not (tmp_path / "bundles" / "node-1").exists()
    (tmp_path / name).write_bytes(b"cut short")
    with pytest.raises(ConfigError, match="are not the federation's authority"):
        renew(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("server*.pem")} == kept


def test_another_authoritys_key_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        provision(tmp_path / name, "localhost", 1)
    (tmp_path / "other" / "ca-key.pem").replace(tmp_path / "one" / "ca-key.pem")
    with pytest.raises(ConfigError, match="key and certificate are no pair"):
        renew(tmp_path / "one")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write \S+file\S*: (Not a directory|File exists)"):
        provision(tmp_path / "file" / "federation", "localhost", 1)
