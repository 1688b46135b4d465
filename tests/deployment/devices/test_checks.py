"""What a device is told when something is wrong, each fault made for real."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
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
from flwr.app import Context

from client.device import checks
from client.device.bundle import Bundle
from client.device.checks import Finding, check
from client.device.participation import parse_bytes
from fedllm.errors import ConfigError, RunFailed
from server.federation import provision as provisioning
from server.federation.provision import provision
from tests.processes import free_port
from tests.rounds.federation import DeviceGrid, configuration, run


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
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # looks so often for its end
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


@pytest.mark.parametrize("number", ['"-5"', "-5", "true", "1.0", '"1"'])
def test_a_number_that_is_none_is_refused(number: str, made: tuple[Path, Bundle]) -> None:
    path = made[1].folder / "bundle.toml"
    path.write_text(path.read_text().replace("node = 0", f"node = {number}"))
    with pytest.raises(
        ConfigError, match=r"is no bundle: node = .* in bundle.toml is not the number of a node"
    ):
        Bundle.read(made[1].folder)


def test_a_number_that_the_key_was_not_made_for_is_found(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    path = made[1].folder / "bundle.toml"
    assert "number" not in findings(made[1], tmp_path)
    path.write_text(path.read_text().replace("node = 0", "node = 99"))
    changed = findings(Bundle.read(made[1].folder), tmp_path)["number"]
    assert not changed.good
    assert changed.sentence.startswith(
        "node = 99 in bundle.toml is not the number that node.key was made for"
    )


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
    with pytest.raises(ConfigError, match=r"copy bundles/node-N") as refused:
        Bundle.read(tmp_path / "copy")
    assert "Errno" not in str(refused.value)


def test_disk_and_memory(made: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(made[1], tmp_path)
    assert found["disk"].good
    assert found["memory"].good
    assert not findings(made[1], tmp_path, memory=1 << 50)["memory"].good
    assert "less than torch" in findings(made[1], tmp_path, memory=1 << 20)["memory"].sentence
    monkeypatch.setattr("client.device.checks.LEAST_DISK", 1 << 60)
    assert "free some" in findings(made[1], tmp_path)["disk"].sentence


def test_data(made: tuple[Path, Bundle], tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "label": "a"}) for i in range(3)))
    good = findings(made[1], tmp_path, data=path)["data"]
    assert (good.good, good.sentence) == (True, "3 texts of 1 classes: a")
    assert (
        "no column 'body' (data.text); the columns are text, label"
        in findings(made[1], tmp_path, data=path, text="body")["data"].sentence
    )
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b"}\n')
    assert "line 2: there is no column 'label'" in findings(made[1], tmp_path, data=path)["data"].sentence
    assert findings(made[1], tmp_path, data=path, label=None)["data"].good
    assert "does not exist" in findings(made[1], tmp_path, data=tmp_path / "none.csv")["data"].sentence


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"text": "t"}, "line 1201: there is no column 'label'"),
        ({"text": 5, "label": "a"}, "line 1201: column 'text' is not text but int 5"),
        ({"text": "t", "label": 0.5}, "line 1201: column 'label' .* not float 0.5"),
        ({"text": "t", "label": ["a", "b"]}, "line 1201: data.label holds a list of classes"),
        ({"text": "t \ud83d", "label": "a"}, "line 1201: .* half a character"),
    ],
)
def test_the_check_reads_to_the_end_as_the_worker_does(
    last: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(1200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))
    found = checks.check_texts(path, "text", "label")
    assert not found.good
    assert re.search(words, found.sentence)


@pytest.mark.slow
def test_a_run_that_ends_for_a_devices_texts_leaves_the_reason_to_the_check(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"text": "apple", "label": "fruit"}\n{"text": "iron", "label": 0.5}\n')
    found = checks.check_texts(own, "text", "label")
    assert not found.good
    assert str(own) in found.sentence

    class Alone(DeviceGrid):
        def context(self, node: int) -> Context:
            context = super().context(node)
            context.node_config["data"] = str(own)
            return context

    data = {"path": str(tiny_texts), "max_length": 16, "classes": ["animal", "fruit", "metal"]}
    server = {"deadline_s": 0.2}
    config = configuration(tiny_encoder, tiny_texts, clients=1, server=server, data=data)
    with pytest.raises(RunFailed) as caught:
        run(config, tmp_path / "run", grid_of=Alone)
    assert "0 of 1 clients" in str(caught.value)
    assert "node 0 was not admitted: this device's texts are not what the run asks for" in str(caught.value)
    assert str(own) not in str(caught.value)


@pytest.mark.parametrize("text", ["", "two", "1..5GB", "1TB", "-1GB", "."])
def test_amounts_of_memory_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an amount of memory"):
        parse_bytes(text)


def test_port_of_an_ipv6_server() -> None:
    assert Bundle(Path(), "[2001:db8::1]:8000", 0).host_and_port == ("2001:db8::1", 8000)
    assert socket.inet_pton(socket.AF_INET6, "2001:db8::1")
