"""What a device says of itself, of a server that it does not reach, and of others with its bundle."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from client.device import supervisor as devices
from client.device import trial, troubles
from client.device.bundle import Bundle
from client.device.checks import Finding, check_network
from client.device.participation import Device
from client.device.screen import NOT_ACTIVATED
from client.device.supervisor import join
from client.device.trial import try_network, try_run, try_texts
from client.device.troubles import COUNTED_SECONDS, Background, Presence, sole_user
from fedllm.errors import ConfigError, ModelError, StoreError
from fedllm.host.processes import open_log
from server.federation import provision as provisioning
from server.federation.provision import provision
from tests.processes import free_port, until

GOOD = [Finding("server", True, "answers")]
BAD = [Finding("server", False, "nothing listens on port 7"), Finding("clock", True, "agrees")]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.read(provision(tmp_path / "federation", "localhost", 1, port=free_port())[0])


def prints(*lines: str) -> Callable[..., list[str]]:
    """A command in the SuperNode's place that prints lines and waits."""
    said = "; ".join(f"echo '{line}'" for line in lines)
    return lambda *_: ["sh", "-c", f"{said}; exec sleep 3600"]


class Hurried(threading.Event):
    """What a device waits for between two looks; fifty times as often as it does otherwise."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(timeout and timeout / 50)


def told(
    device: Device,
    enough: Callable[[list[str]], bool],
    monkeypatch: pytest.MonkeyPatch,
    *lines: str,
    network: list[Finding] = GOOD,
) -> tuple[list[str], BaseException | None]:
    """Run a device whose SuperNode prints ``lines`` until it has said enough, or has ended."""
    monkeypatch.setattr(devices, "_supernode_command", prints(*lines))
    monkeypatch.setattr(devices, "try_network", lambda bundle, insecure: network)
    said: list[str] = []
    ended: list[BaseException | None] = []
    stop = Hurried()

    def run() -> None:
        try:
            join(device, report=said.append, status=said.append, stop=stop)
            ended.append(None)
        except ConfigError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: enough(said) or ended)
    stop.set()
    thread.join()
    return said, ended[0]


REFUSED = f"[code: {NOT_ACTIVATED}] Failed to activate SuperNode."
RETRYING = "WARNING :   Connection attempt failed, retrying in 0.44 seconds"


@pytest.mark.slow
def test_the_first_lines_say_who_where_and_with_what(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "apple", "label": "fruit"}\n{"text": "iron", "label": "metal"}\n')
    device = Device(bundle, tmp_path / "state", data=texts, memory=2_000_000_000, threads=3)
    said, _ = told(device, lambda said: any("2 texts" in line for line in said), monkeypatch)
    assert said[0].endswith(f": node 0 of {bundle.server}")
    assert said[1:3] == [
        f"data: {texts}",
        f"worker: 2.0 GB at most, 3 threads; state: {tmp_path / 'state'}",
    ]
    assert "data: 2 texts of 2 classes: fruit, metal" in said


@pytest.mark.slow
def test_texts_that_the_columns_do_not_fit_are_said_and_do_not_end_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may name other columns; only it can tell."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"body": "apple", "label": "fruit"}\n')
    device = Device(bundle, tmp_path / "state", data=texts)
    said, error = told(device, lambda said: any("no column" in line for line in said), monkeypatch)
    assert error is None
    assert any("there is no column 'text'" in line and "--text and --label" in line for line in said)


def test_texts_that_are_not_there_end_it(bundle: Bundle, tmp_path: Path) -> None:
    device = Device(bundle, tmp_path / "state", data=tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"--data .*none\.jsonl does not exist"):
        join(device, report=lambda said: None, stop=threading.Event())


def test_a_key_that_others_can_read_is_said_at_the_start(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle.key.chmod(0o644)
    said, _ = told(Device(bundle, tmp_path / "state"), lambda said: len(said) > 4, monkeypatch)
    assert f"key: {bundle.key} can be read by others; run: chmod 600 {bundle.key}" in said


def test_a_server_that_is_not_reached_is_one_sentence_once(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(troubles, "FIRST_PAUSE_SECONDS", 0.0)
    device = Device(bundle, tmp_path / "state")
    said, error = told(
        device,
        lambda said: any("cannot connect; server" in line for line in said),
        monkeypatch,
        RETRYING,
        network=BAD,
    )
    assert error is None
    assert said.count("server: nothing listens on port 7") == 1
    assert not any("agrees" in line for line in said)


def test_a_bundle_that_is_in_use_elsewhere_ends_it_at_once(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, error = told(Device(bundle, tmp_path / "state"), lambda said: False, monkeypatch, REFUSED)
    assert str(error).startswith(
        f"node 0 is connected to {bundle.server} already: another client takes part with a copy"
    )


def test_its_own_last_connection_is_waited_for(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir()
    Presence(tmp_path / "state").note()
    said, error = told(
        Device(bundle, tmp_path / "state"),
        lambda said: any("last connection" in line for line in said),
        monkeypatch,
        REFUSED,
    )
    assert error is None
    assert "the server still counts this node's last connection; it lets the node in within a minute" in said


def test_a_connection_is_remembered_for_as_long_as_a_server_may_count_it(tmp_path: Path) -> None:
    presence = Presence(tmp_path)
    assert not presence.recent()
    presence.note()
    assert Presence(tmp_path).recent()
    assert (tmp_path / "connected").stat().st_mode & 0o777 == 0o600
    before = time.time() - COUNTED_SECONDS - 1
    os.utime(tmp_path / "connected", (before, before))
    assert not presence.recent()
    presence.note()  # it was noted a moment ago: that is enough
    assert not presence.recent()
    Presence(tmp_path).note()
    assert presence.recent()


def test_one_bundle_serves_one_client_of_a_machine(bundle: Bundle, tmp_path: Path) -> None:
    """Whatever its state folder; also where the bundle cannot be written."""
    bundle.folder.chmod(0o500)
    one, other = Device(bundle, tmp_path / "one"), Device(bundle, tmp_path / "other")
    one.state.mkdir()
    with sole_user(bundle, one.state), pytest.raises(ConfigError) as caught:
        join(other, report=lambda said: None, stop=threading.Event())
    assert str(caught.value).startswith(f"another client on this machine takes part with {bundle.folder}; ")
    stop = threading.Event()
    stop.set()
    join(other, report=lambda said: None, stop=stop)


def test_a_file_system_without_locks_is_no_reason_to_stay_away(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("filelock.FileLock", lambda *_, **__: threading.Lock())
    with sole_user(bundle, tmp_path):
        pass


def test_a_key_of_another_user_is_one_sentence(bundle: Bundle, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        bundle.key.unlink()  # root reads everything that is there
    else:
        bundle.key.chmod(0)
    with pytest.raises(ConfigError, match=r"node\.key cannot be read: "), sole_user(bundle, tmp_path):
        pass


def test_looks_come_ever_less_often_until_they_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    looks: list[float] = []

    def look() -> list[Finding]:
        looks.append(clock[0])
        return GOOD

    background = Background(look)
    monkeypatch.setattr(troubles, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))
    assert background.found() is None
    while clock[0] < 2000:
        background.begin()
        until(lambda: background._thread is None or not background._thread.is_alive())
        background.found()
        clock[0] += 1
    gaps = [later - earlier for earlier, later in pairwise(looks)]
    assert gaps[:7] == [15, 30, 60, 120, 240, 480, 600]
    background.reset()
    background.begin()
    until(lambda: background.found() == GOOD)
    assert looks[-1] == clock[0]


def test_an_expired_certificate_is_found_by_a_process_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.deployment.devices.test_checks import web_server

    folder = tmp_path / "federation"
    provision(folder, "localhost", 1, port=(port := free_port()))
    monkeypatch.setattr(provisioning, "SERVER_DAYS", -0.5)
    provisioning.renew(folder)
    bundle = Bundle.read(folder / "bundles/node-0")
    with web_server(folder, port):
        found = try_network(bundle, insecure=False)
        here = list(check_network(bundle))
    assert found == here
    assert [finding.name for finding in found if not finding.good] == ["certificate"]
    assert "expired; on the server: fedllm provision DIR --renew" in found[1].sentence


def test_without_tls_the_server_alone_is_checked(bundle: Bundle) -> None:
    (found,) = check_network(bundle, insecure=True)
    assert (found.name, found.good) == ("server", False)


def test_a_full_disk_is_one_sentence_and_no_traceback(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    stop = threading.Event()
    stop.set()
    log = open_log(tmp_path / "state" / "client.log")
    with monkeypatch.context() as patched:
        patched.setattr(log.handlers[0].stream, "write", full)  # type: ignore[attr-defined]
        log.info("lost")
        patched.setattr(Path, "write_text", full)
        with pytest.raises(StoreError, match=r"^disk full at .*state: free space$"):
            join(Device(bundle, tmp_path / "state"), report=lambda said: None, stop=stop)
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_fills_up_is_shown(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(devices, "LOOK_TICKS", 1)
    said, _ = told(
        Device(bundle, tmp_path / "state"),
        lambda said: any(line.endswith("worker") and "disk is full" in line for line in said),
        monkeypatch,
        "SuperNode ID: 7",
    )
    assert said.count("the disk is full: free space, or choose another folder with --state") == 1


@pytest.mark.parametrize("asked", [True, False])
def test_a_pause_that_never_comes_is_refused(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    device = Device(bundle, tmp_path / "state", pause_on_metered=asked)
    stop = threading.Event()
    stop.set()
    if not asked:
        join(device, report=lambda said: None, stop=stop)
        return
    with pytest.raises(
        ConfigError, match=r"--pause-on-metered asks NetworkManager \(nmcli\), which is not on"
    ):
        join(device, report=lambda said: None, stop=stop)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Error: NetworkManager is not running.' >&2; exit 8", "NetworkManager is not running."),
        ("exit 3", "status 3"),
    ],
)
def test_a_network_manager_that_does_not_answer_pauses(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    """Whoever asks to spend nothing on a metered link spends nothing on one that may be."""
    program = tmp_path / "nmcli"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    said = str(Device(bundle, tmp_path, pause_on_metered=True).reason_to_pause())
    assert said.startswith("as NetworkManager does not say whether the link is metered (")
    assert reason in said


def test_a_battery_that_nobody_sees_is_said(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.sensors_battery", lambda: None, raising=False)
    device = Device(bundle, tmp_path / "state", pause_on_battery=True)
    said, _ = told(device, lambda said: len(said) > 3, monkeypatch)
    assert "pause: no battery is seen on this device, so --pause-on-battery never pauses it" in said


RUN = """
rounds = 1
clients = 2
method = "fedavg"
[model]
name = "{model}"
[data]
path = "{texts}"
max_length = 16
[training]
batch_size = 2
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "good", "words"),
    [
        ([("apple", "fruit"), ("iron", "metal")], True, "run: 2 texts to train on; a few steps took "),
        ([("apple", "fruit"), ("iron", "stone")], False, "label 'stone' is none of the federation's classes"),
        ([("", "fruit"), (" ", "metal")], False, "there is no text in it"),
        ([("apple", None)], False, "line 1: .*'label'"),
    ],
)
def test_a_run_is_tried_with_the_devices_texts(
    own: list[tuple[str, str | None]],
    good: bool,
    words: str,
    tiny_encoder: Path,
    tiny_texts: Path,
    tmp_path: Path,
) -> None:
    found = tried(own, tiny_encoder, tiny_texts, tmp_path, None)
    assert found.good == good
    assert re.search(words, found.sentence)


@pytest.mark.slow
def test_a_run_that_its_memory_does_not_hold_is_found(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    found = tried([("apple", "fruit")], tiny_encoder, tiny_texts, tmp_path, 5_000_000)
    assert not found.good
    assert "--memory" in found.sentence


def tried(
    rows: list[tuple[str, str | None]], model: Path, texts: Path, folder: Path, memory: int | None
) -> Finding:
    (folder / "run.toml").write_text(RUN.format(model=model, texts=texts))
    own = folder / "own.jsonl"
    lines = [{"text": text} | ({} if label is None else {"label": label}) for text, label in rows]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = try_run(str(folder / "run.toml"), 0, own, memory)
    return found


@pytest.mark.parametrize(
    "cause",
    [MemoryError(), RuntimeError("not enough memory: you tried"), ImportError("failed to map segment")],
)
def test_want_of_memory_is_known_however_a_library_words_it(
    cause: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(memory: int) -> list[Finding]:
        raise ModelError("cannot train") from cause

    monkeypatch.setitem(trial._KINDS, "run", run)
    found = trial._tried({"kind": "run", "memory": 600_000_000})
    assert found == [Finding("memory", False, "the run needs more than --memory allows, 0.60 GB")]


def test_a_preset_that_does_not_exist_is_one_sentence() -> None:
    (found,) = trial._tried({"kind": "run", "source": "quikstart", "node": 0, "data": "", "memory": None})
    assert (found.name, found.good) == ("run", False)
    assert "'quikstart' is neither a TOML file nor a preset" in found.sentence


@pytest.mark.slow
def test_texts_are_counted_by_a_process_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "apple"}\n')
    (found,) = try_texts(path, "text", None)
    assert found == Finding("data", True, "1 texts")
