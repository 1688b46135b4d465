"""What a device's user reads: who it is to the server, and what keeps it from taking part."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from client.app import app
from client.device.screen import Progress, say
from client.node import CONFIG_KEY
from client.resident import WorkerError
from fedllm.protocol import wire
from fedllm.protocol.wire import STALE, Instruction, Reply
from simulations.engines.loopback import loopback


def told(capsys: pytest.CaptureFixture[str], said: str) -> str:
    say(said)
    return capsys.readouterr().out


def test_what_an_app_says_is_reported_once_and_shown_until_work_comes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress()
    refused = told(capsys, "the server does not take\nthis device into the run a: it is full")
    for _ in range(2):
        for line in ("SuperNode ID: 7", "[RUN 1, ROUND describe]", "Receiving: train message"):
            progress.read(line)
        assert (progress.busy, progress.doing) == (True, "introducing itself to a run")
        progress.read(refused)
        progress.read("Sent successfully")
        assert progress.trouble == "the server does not take this device into the run a: it is full"
    assert progress.news == [progress.trouble]
    for line in ("[RUN 1, ROUND 3]", "Receiving: train message"):
        progress.read(line)
    assert progress.doing == "working on round 3"
    progress.read("Sent successfully")
    assert (progress.trouble, progress.doing, progress.answers) == ("", "waiting for work", 3)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence(code: int) -> None:
    progress = Progress()
    progress.read(f"OSError: [Errno {code}] {os.strerror(code)}: 'state/flower/apps'")
    assert progress.news == ["the disk is full: free space, or choose another folder with --state"]


def test_attempts_count_until_one_succeeds() -> None:
    progress = Progress()
    for _ in range(3):
        progress.read("WARNING :   Connection attempt failed, retrying in 1.70 seconds")
    assert progress.attempts == 3
    progress.read("INFO :   Connection successful after 4.00 seconds and 4 tries.")
    assert progress.attempts == 0


REFUSED = {wire.REFUSED: "its key is none\nthat may join"}
SAID = [
    (Instruction("run", "describe"), "no column", "this device cannot take part in the run mine: no column"),
    (
        Instruction("run", "describe", arguments=REFUSED),
        "",
        "the server does not take this device into the run mine: its key is none that may join",
    ),
    (
        Instruction("run", "describe", arguments=REFUSED),
        "no column",
        "cannot take part in the run mine: no c",
    ),
    (
        Instruction("run", "fit", round=3),
        "out of memory",
        "this device could not do its work in round 3 of the run mine: out of memory",
    ),
    (Instruction("run", "fit", round=3), STALE, ""),
    (Instruction("run", "describe"), "", ""),
]


@pytest.mark.parametrize(("asked", "failure", "said"), SAID, ids=range(len(SAID)))
@pytest.mark.parametrize("raised", [False, True])
def test_the_app_says_what_keeps_its_device_out(
    asked: Instruction,
    failure: str,
    said: str,
    raised: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether the worker answers that it cannot, or does not answer at all."""

    def ask(socket: str, request: bytes) -> bytes:
        if raised and failure:
            raise WorkerError(failure)
        return wire.encode(wire.pack_reply(Reply(asked.round, asked.index, error=failure)))

    monkeypatch.setattr("client.resident.ask", ask)
    content = answered(wire.pack_instruction(asked), tmp_path)
    assert wire.unpack_reply(content).error == failure
    printed = capsys.readouterr().out
    assert said in printed
    assert len(printed.splitlines()) == (1 if said else 0)


def test_a_server_of_another_format_is_said_to_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedllm.protocol.wire.VERSION", 2)
    asked = wire.pack_instruction(Instruction("run", "describe"))
    monkeypatch.setattr("fedllm.protocol.wire.VERSION", 1)
    error = wire.unpack_reply(answered(asked, tmp_path)).error
    assert error == "the server speaks format 2 and this device format 1: upgrade fedllm on the device"
    assert f"this device cannot take part in the run mine: {error}" in capsys.readouterr().out


def answered(content: RecordDict, state: Path) -> RecordDict:
    """Have the device's app answer, as the process does that Flower starts for a message."""
    config = {"partition-id": 0, "state-dir": str(state), "worker-socket": str(state / "w")}
    context = Context(1, 2, config, RecordDict(), {CONFIG_KEY: '{"name": "mine"}'})
    with loopback(1, {}):  # for the identity that Flower's messages are given in a process of its own
        return app(Message(content, 2, "train"), context).content
