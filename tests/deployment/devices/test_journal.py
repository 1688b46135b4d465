"""What of a device's log travels, and what the server keeps of it."""

from __future__ import annotations

from pathlib import Path

from flwr.app import RecordDict

from client.device.journal import LONGEST, news
from fedllm.config import RunConfig
from fedllm.protocol import wire
from fedllm.protocol.wire import Reply
from fedllm.runs.database import NODE_LOGS_KEPT
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore


def write(log: Path, *lines: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.writelines(f"2026-01-01 00:00:00,000 {line}\n" for line in lines)


def told(log: Path) -> list[str]:
    return [line.partition(",000 ")[2] for line in news(log).splitlines()]


def test_each_telling_line_is_told_once(tmp_path: Path) -> None:
    log = tmp_path / "client.log"
    assert news(log) == ""
    write(
        log, "device: fedllm 0.1.0 starts as node 3", "INFO : Receiving: train message", "WARNING : slow disk"
    )
    assert told(log) == ["device: fedllm 0.1.0 starts as node 3", "WARNING : slow disk"]
    assert told(log) == []
    write(log, "INFO : Sent successfully")
    assert told(log) == []
    write(log, "KeyError: 'nobody foresaw this'")
    assert told(log) == ["KeyError"]


def test_a_log_that_was_rotated_is_told_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "client.log"
    write(log, *(f"worker: line {number} of the old file" for number in range(9)))
    assert len(told(log)) == 9
    log.rename(tmp_path / "client.log.1")
    write(log, "worker: ready")
    assert told(log) == ["worker: ready"]


def test_of_too_much_the_last_is_told(tmp_path: Path) -> None:
    log = tmp_path / "client.log"
    write(log, *(f"worker: error {number}" for number in range(5000)))
    assert told(log)[-1] == "worker: error 4999"
    assert news(log) == ""
    write(log, "worker: " + "x" * 10_000)
    assert len(news(log)) == LONGEST


def test_lines_travel_with_any_reply(tmp_path: Path) -> None:
    content = wire.pack_reply(Reply(1, 0, 5, {"loss": 1.0}, {"python": "3.11"}, b"payload"))
    wire.add_log(content, "x" * 10_000)
    reply = wire.unpack_reply(content)
    assert (len(reply.facts["log"]), reply.facts["python"], reply.payload) == (2000, "3.11", b"payload")
    assert wire.sizes(content)["facts"] > 2000
    foreign = RecordDict()
    wire.add_log(foreign, "said")
    assert wire.encode(foreign)


def test_the_store_keeps_the_newest_of_each_node(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", RunConfig(name="run")) as store:
        run = Run(store.folder)
        assert run.node_logs() == []
        store.node_log(7, "only once", round=0)
        for number in range(NODE_LOGS_KEPT + 5):
            store.node_log(2, f"line {number}", round=number)
        store.node_log(2, "a\nb\x1b[31mred", round=0)
    kept = run.node_logs(node=2)
    assert len(kept) == NODE_LOGS_KEPT
    assert (kept[0].lines, kept[-1].lines) == ("line 6", "a\nb\ufffd[31mred")
    assert [row.lines for row in run.node_logs(node=7)] == ["only once"]
    assert run.node_logs(after=kept[-2].id) == [kept[-1]]
