"""The Grafana dashboard and the alert rules name metrics that exist."""

from __future__ import annotations

import json
import re
from importlib.resources import files

from fedllm.config import RunConfig
from fedllm.runs.ledger import Entry
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.runs.writer import RunStore
from server.dashboard.actions.operations import Operations
from tests.dashboard.client import TestClient

_NAME = re.compile(r"\bfedllm_[a-z_]+")


def test_what_is_asked_for_is_exported(ops: Operations, operator: TestClient) -> None:
    with RunStore.create(ops.root / "live", RunConfig(name="live", clients=3)) as store:
        rows = [NodeRound(round=1, node=0, status="accepted", compute_seconds=1.0)]
        record = RoundRecord(round=1, metrics={"accuracy": 0.5}, seconds=1.0)
        store.round(record, rows, [Entry(1, 0, "up", "fit", "payload", 70)])
        exported = set(_NAME.findall(operator.get("/metrics").text))
    folder = files("server.dashboard")
    board = json.loads(folder.joinpath("grafana.json").read_text())
    asked = set(_NAME.findall(json.dumps(board)))
    asked |= set(_NAME.findall(folder.joinpath("alerts.yml").read_text()))
    assert len(asked) > 10
    assert asked - exported == set()


def test_the_board_is_whole() -> None:
    board = json.loads(files("server.dashboard").joinpath("grafana.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["targets"] for panel in board["panels"])
