"""What stands in a device's texts does not leave it: in no error, no log line, no name of a metric."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import outward
from client.device.journal import news
from client.node import NodeContext
from client.worker import answer
from fedllm.config import RunConfig
from fedllm.errors import DataError, FedllmError
from fedllm.host.processes import open_log
from fedllm.protocol import wire
from fedllm.protocol.wire import Instruction
from strategies.session import forget_sessions
from tests.rounds.federation import configuration

SECRET = "Jane Doe of ward 9, HIV positive"


@pytest.fixture(autouse=True)
def _own_session() -> Iterator[None]:
    forget_sessions()
    yield
    forget_sessions()


def asked_of(config: RunConfig, data: Path, tmp_path: Path) -> wire.Reply:
    """Let a device introduce itself to a run that a server made up."""
    place = NodeContext(0, str(data), str(tmp_path / "state"), str(tmp_path / "state"), keep_replies=True)
    content = wire.pack_instruction(Instruction("run", "describe"))
    return wire.unpack_reply(answer(content, config.to_json(), place))


ROWS: dict[str, Any] = {
    "a list": [{"text": [SECRET], "label": "a"}],
    "no text": [{"text": "", "label": "a"}, {"text": SECRET, "label": None}],
    "an unknown class": [{"text": "plum", "label": SECRET}],
    "a number": [{"text": "plum", "label": {"who": SECRET}}],
    "no column": [{SECRET: "plum"}],
    "no rows": SECRET,
}


@pytest.mark.parametrize("held", ROWS)
@pytest.mark.parametrize("task", ["classification", "regression", "tokens", "span", "instruct"])
def test_a_run_that_does_not_fit_the_texts_gets_to_know_nothing_of_them(
    held: str,
    task: str,
    tiny_encoder: Path,
    tiny_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "notes.jsonl"
    content = ROWS[held]
    data.write_text(
        content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    )
    config = configuration(tiny_encoder, tiny_texts).model_copy(deep=True)
    config = config.model_copy(update={
        "model": config.model.model_copy(update={"task": task}),
        "data": config.data.model_copy(update={"classes": ("animal", "fruit", "metal")}),
    })  # fmt: skip
    kept: list[str] = []
    monkeypatch.setattr(outward._log, "error", lambda text, *given, **_: kept.append(text % given))
    reply = asked_of(config, data, tmp_path)
    assert "Jane" not in repr(reply)
    assert not wire.unpack_reply(wire.pack_reply(reply)).payload
    if reply.error.startswith("this device's texts"):
        assert len(kept) == 1


def test_classes_that_the_run_does_not_name_are_told_by_no_metric(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    data = tmp_path / "notes.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"plum {n}", "label": f"{SECRET} {n}"}) + "\n" for n in range(4))
    )
    reply = asked_of(configuration(tiny_encoder, tiny_texts), data, tmp_path)
    assert "the run does not name its classes" in reply.error
    assert "Jane" not in repr(reply)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError(f"row 3: {SECRET!r} is no number"), "this device's texts are not what the run asks for"),
        (ValueError(f"could not convert {SECRET!r}"), "ValueError, of which the device's own log says more"),
        (KeyError(SECRET), "KeyError, of which"),
        (FedllmError("the disk is full"), "the disk is full"),
    ],
)
def test_an_error_is_told_without_what_it_quotes(error: Exception, said: str) -> None:
    assert outward.reason(error).startswith(said)


def test_of_a_log_the_lines_that_hold_no_text_travel(tmp_path: Path) -> None:
    """As the worker writes them and the device keeps them."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    try:
        outward.log_to(stream)
        logging.getLogger("fedllm.worker").info("ready")
        logging.getLogger("strategies.session").info("3 of 9 texts were cut")
        logging.getLogger("fedllm.data.corpus").warning("labels: %r is read as %r", SECRET, "a")
        logging.getLogger("transformers").error("ERROR: %s", SECRET)
        outward.reason(DataError(f"row 1\nworker: {SECRET}\n2026-01-01 00:00:00,000 worker: {SECRET}"))
        try:
            raise KeyError(f"{SECRET}\nERROR {SECRET}")
        except KeyError as error:
            outward.reason(error)
    finally:
        root.handlers = handlers
        root.setLevel(level)
    log = open_log(tmp_path / "client.log")
    for line in stream.getvalue().splitlines():  # as a child's output is read
        log.info("%s", line)
    log.info("device: data: 3 texts of 2 classes: %s", SECRET)
    log.info("device: starts")
    log.info("ValueError: %s", SECRET)
    told = news(tmp_path / "client.log")
    assert "Jane" not in told
    assert [line[24:] for line in told.splitlines()] == [
        "worker: ready",
        "worker: 3 of 9 texts were cut",
        "device: starts",
        "ValueError",
    ]
    assert (tmp_path / "client.log").read_text().count("Jane") > 4  # its owner finds all of it there
