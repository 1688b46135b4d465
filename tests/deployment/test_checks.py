"""What a device is told when something is wrong, each fault made for real."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from email.utils import formatdate
from pathlib import Path

import pytest

from client.checks import Bundle, Finding, check
from client.device import parse_bytes
from fedllm.errors import ConfigError
from server import provision as provisioning
from server.provision import provision
from tests.deployment.conftest import free_port


def findings(bundle: Bundle, tmp_path: Path, **options: object) -> dict[str, Finding]:
    return {item.name: item for item in check(bundle, state=tmp_path / "state", **options)}  # type: ignore[arg-type]


@contextlib.contextmanager
def web_server(folder: Path, port: int, *, ahead: float = 0.0, tls: bool = True) -> Iterator[None]:
    """An HTTPS server with the federation's certificate, whose clock may be off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + ahead, usegmt=True)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            pass  # a client that refuses the certificate hangs up in the middle of the handshake

    server = Server(("0.0.0.0", port), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server-key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Bundle]:
    folder = tmp_path / "federation"
    bundles = provision(folder, "localhost", 1, port=free_port())
    return folder, Bundle.read(bundles[0])


def test_nothing_listens(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    found = findings(made[1], tmp_path)
    assert not found["server"].good
    assert "nothing listens on port" in found["server"].sentence
    assert found.keys() == {"server", "disk", "memory"}


def test_an_unknown_host(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    found = findings(made[1]._replace(server="nowhere.invalid:8000"), tmp_path)
    assert "the name nowhere.invalid is unknown" in found["server"].sentence


def test_no_tls(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, bundle = made
    with web_server(folder, bundle.host_and_port[1], tls=False):
        found = findings(bundle, tmp_path)
    assert found["server"].good
    assert "speaks no TLS" in found["certificate"].sentence


def test_another_federations_certificate(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    provision(tmp_path / "other", "localhost", 1)
    with web_server(tmp_path / "other", made[1].host_and_port[1]):
        assert "belongs to another federation" in findings(made[1], tmp_path)["certificate"].sentence


def test_a_certificate_for_another_name(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, bundle = made
    with web_server(folder, bundle.host_and_port[1]):
        # 127.0.0.2 leads here as well, but the certificate does not name it.
        found = findings(bundle._replace(server=f"127.0.0.2:{bundle.host_and_port[1]}"), tmp_path)
    assert "made for another name than 127.0.0.2" in found["certificate"].sentence


@pytest.mark.parametrize(
    ("constant", "value", "sentence"),
    [("SERVER_DAYS", -0.5, "expired"), ("BACKDATED", timedelta(days=-1), "not yet valid")],
)
def test_a_certificate_out_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, value: object, sentence: str
) -> None:
    folder = tmp_path / "federation"
    provision(folder, "localhost", 1, port=(port := free_port()))
    monkeypatch.setattr(provisioning, constant, value)
    provisioning.renew(folder)
    with web_server(folder, port):
        found = findings(Bundle.read(folder / "bundles/node-0"), tmp_path)
    assert sentence in found["certificate"].sentence


@pytest.mark.parametrize(
    ("ahead", "good"), [(0.0, True), (250.0, True), (-30.0, False), (400.0, False), (-4.0, True)]
)
def test_the_clock(made: tuple[Path, Bundle], tmp_path: Path, ahead: float, good: bool) -> None:
    """``ahead`` is the server's clock: Flower forgives a device 5 s of haste and 300 s of lateness."""
    folder, bundle = made
    with web_server(folder, bundle.host_and_port[1], ahead=ahead):
        clock = findings(bundle, tmp_path)["clock"]
    assert clock.good == good
    if not good:
        assert ("ahead of" if ahead < 0 else "behind") in clock.sentence


def test_a_server_that_is_none_of_ours(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, bundle = made
    with web_server(folder, bundle.host_and_port[1]):
        assert "is it a fedllm server?" in findings(bundle, tmp_path)["key"].sentence


def test_a_key_that_others_can_read(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    made[1].key.chmod(0o644)
    assert "chmod 600" in findings(made[1], tmp_path)["key"].sentence


def test_a_damaged_key(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    made[1].key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nnonsense\n")
    assert "copy the bundle again" in findings(made[1], tmp_path)["key"].sentence


@pytest.mark.parametrize("missing", ["bundle.toml", "ca.pem", "node.key"])
def test_an_incomplete_bundle(made: tuple[Path, Bundle], tmp_path: Path, missing: str) -> None:
    shutil.copytree(made[1].folder, tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    with pytest.raises(ConfigError, match=r"copy bundles/node-N"):
        Bundle.read(tmp_path / "copy")


def test_disk_and_memory(made: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(made[1], tmp_path)
    assert found["disk"].good
    assert found["memory"].good
    assert not findings(made[1], tmp_path, memory=1 << 50)["memory"].good
    assert "less than torch" in findings(made[1], tmp_path, memory=1 << 20)["memory"].sentence
    monkeypatch.setattr("client.checks.LEAST_DISK", 1 << 60)
    assert "free some" in findings(made[1], tmp_path)["disk"].sentence


def test_data(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "label": "a"}) for i in range(3)))
    good = findings(made[1], tmp_path, data=path)["data"]
    assert (good.good, good.sentence) == (True, "3 rows with what is needed")
    assert (
        "no column 'body'; there are text, label"
        in findings(made[1], tmp_path, data=path, text="body")["data"].sentence
    )
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    assert "line 2: no column 'label'" in findings(made[1], tmp_path, data=path)["data"].sentence
    assert findings(made[1], tmp_path, data=path, label=None)["data"].good
    assert "does not exist" in findings(made[1], tmp_path, data=tmp_path / "none.csv")["data"].sentence


@pytest.mark.parametrize("text", ["", "two", "1..5GB", "1TB", "-1GB", "."])
def test_amounts_of_memory_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an amount of memory"):
        parse_bytes(text)


def test_port_of_an_ipv6_server() -> None:
    assert Bundle(Path(), "[2001:db8::1]:8000", 0).host_and_port == ("2001:db8::1", 8000)
    assert socket.inet_pton(socket.AF_INET6, "2001:db8::1")
