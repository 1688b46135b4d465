"""Damaged, half-written and oddly named runs: they are shown as what they are, and spoil nothing else."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from fedllm.config import RunConfig
from fedllm.runs.records import FILE, RoundRecord
from fedllm.runs.writer import RunStore
from server.dashboard.actions.operations import Operations
from server.dashboard.reading.runs import RunIndex
from tests.dashboard.client import TestClient
from tests.reports.made_up import make_run


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _sql(statement: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        with sqlite3.connect(folder / FILE) as connection:
            connection.execute(statement)

    return damage


def _put_folder(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "summary.json").mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no summary": lambda folder: (folder / "summary.json").unlink(),
    "a list for a summary": _write("summary.json", b"[]"),
    "an empty summary": _write("summary.json", b"{}"),
    "null for a summary": _write("summary.json", b"null"),
    "half a summary": _write("summary.json", b'{"schema": 1, "bytes": {"up"'),
    "no text": _write("summary.json", b"\xff\xfe\x00"),
    "metrics that are no JSON": _sql("UPDATE rounds SET metrics = 'x'"),
    "an empty database": _write(FILE, b""),
    "another database": _sql("DROP TABLE meta"),
    "a database without facts": _sql("DELETE FROM meta"),
    "a status that is no JSON": _sql("UPDATE meta SET value = 'x' WHERE key = 'status'"),
    "a folder for a file": _put_folder,
}


@pytest.mark.slow
def test_damaged_runs_leave_the_others_alone(ops: Operations, operator: TestClient) -> None:
    make_run(ops.root / "good")
    for name, damage in DAMAGES.items():
        damage(make_run(ops.root / name).folder)
    rows = {row["name"]: row for row in operator.get("/api/runs").json()}
    assert rows.pop("good")["state"] == "finished"
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(DAMAGES, "unreadable")
    assert min(len(row["reason"]) for row in rows.values()) > 10
    assert f'state="unreadable"}} {len(DAMAGES)}.0' in operator.get("/metrics").text
    for name in DAMAGES:
        for path in ("", "/rounds", "/nodes", "/answers", "/events", "/config", "/files/summary.json"):
            answer = operator.get(f"/api/runs/{name}{path}")
            assert answer.status_code == 200 or answer.json()["detail"], (name, path)


def test_a_line_that_is_being_written_is_not_read_yet(ops: Operations) -> None:
    folder = make_run(ops.root / "a").folder
    with (folder / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round": 4, "accu')
    view = ops.overview("a")
    assert (view.state, view.round) == ("finished", 3)


def test_a_run_is_read_while_it_is_written(ops: Operations) -> None:
    over = threading.Event()
    seen: list[tuple[str, str, int]] = []

    def read() -> None:
        while not over.is_set():
            index = RunIndex(ops.root)
            view = index.overview("live")
            seen.append((view.state, view.reason, len(index.rounds("live"))))

    with RunStore.create(ops.root / "live", RunConfig(name="live", clients=3, rounds=99)) as store:
        reader = threading.Thread(target=read)
        reader.start()
        for number in range(1, 61):
            store.round(RoundRecord(round=number, metrics={"accuracy": 0.5}, seconds=1.0))
            store.phase("fit", round=number + 1)
        over.set()
        reader.join()
    assert {state for state, _, _ in seen} == {"running"}
    counts = [count for _, _, count in seen]
    assert counts == sorted(counts)


NAMES = ("ü ñ", "50% off?&a=1#x", '<b>"it\'s"', "a;b, c", "x" * 200, "=1+1", "~", "a\\b", "a=b.c-d_e")
SILENT = (b"bell\x07", b"line\nbreak", b"not utf-8 \xff", "\u202eevil".encode())


def test_any_printable_name_can_be_asked_for(ops: Operations, operator: TestClient) -> None:
    for name in NAMES:
        make_run(ops.root / name, accuracies=(0.5,))
    assert {row["name"] for row in operator.get("/api/runs").json()} == set(NAMES)
    for name in NAMES:
        path = f"/api/runs/{quote(name, safe='')}"
        assert operator.get(path).json()["round"] == 1
        header = operator.get(f"{path}/files/rounds.csv").headers["content-disposition"]
        assert header == f"attachment; filename*=UTF-8''{quote(name)}-rounds.csv"
    assert operator.get("/metrics").status_code == 200


def test_other_names_are_told_and_cannot_be_asked_for(ops: Operations, operator: TestClient) -> None:
    for name in SILENT:
        os.rename(make_run(ops.root / "a").folder, os.path.join(os.fsencode(ops.root), name))
    rows = operator.get("/api/runs").json()
    assert len(rows) == len(SILENT)
    for row in rows:
        assert (row["state"], "rename it" in row["reason"]) == ("unreadable", True)
        assert row["name"].isascii()
        assert operator.get("/api/runs/" + row["name"].replace("\\", "%5C")).status_code == 404
    assert operator.get("/metrics").status_code == 200


def test_what_is_missing_is_not_downloaded(ops: Operations, operator: TestClient) -> None:
    (make_run(ops.root / "a").folder / "config.toml").unlink()
    answer = operator.get("/api/runs/a/files/config.toml")
    assert (answer.status_code, "has no config.toml" in answer.json()["detail"]) == (404, True)
