"""The JSON API against runs whose numbers were chosen by hand."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from typing import Any

import pytest

from fedllm.config import RunConfig
from fedllm.run_database import FILE
from fedllm.runs import Run
from fedllm.store import Entry, NodeRound, Round, RunStore
from server.dashboard.desk import Desk
from server.dashboard.launch import Launcher
from tests.dashboard.client import TestClient
from tests.reports.made_up import make_run


def open_run(desk: Desk, name: str = "live", **config: Any) -> RunStore:
    """A run that goes on for as long as the store is open."""
    return RunStore.create(desk.root / name, RunConfig(name=name, clients=3, rounds=5, **config))


def test_the_list_says_how_every_run_stands(desk: Desk, operator: TestClient) -> None:
    make_run(desk.root / "good", model={"name": "minilm"})
    make_run(desk.root / "bad", accuracies=(0.5,), status="failed")
    make_run(desk.root / "gone", accuracies=(0.5,), status="running")
    with open_run(desk) as store:
        store.phase("fit", round=1, have=1, need=3)
        rows = {row["name"]: row for row in operator.get("/api/runs").json()}
    assert {name: row["state"] for name, row in rows.items()} == {
        "live": "running", "good": "finished", "bad": "failed", "gone": "interrupted"
    }  # fmt: skip
    assert next(iter(rows)) == "live"
    assert rows["bad"]["reason"] == "quorum lost in round 3"
    assert rows["live"]["phase"]["have"] == 1
    good = rows["good"]
    assert (good["round"], good["rounds"], good["value"], good["series"]) == (3, 3, 0.9, [0.5, 0.7, 0.9])
    assert (good["bytes_up"], good["bytes_down"], good["rejected"]) == (600, 1800, 3)
    assert [row["name"] for row in operator.get("/api/runs?state=failed").json()] == ["bad"]


def test_a_round_shows_at_the_next_request(desk: Desk, operator: TestClient) -> None:
    with open_run(desk) as store:
        assert operator.get("/api/runs/live").json()["round"] == 0
        for number in (1, 2):
            store.round(Round(round=number, metrics={"accuracy": 0.1 * number}, seconds=4.0))
            view = operator.get("/api/runs/live").json()
            assert (view["round"], view["seconds_left"]) == (number, pytest.approx(4.0 * (5 - number)))
    assert operator.get("/api/runs/live").json()["state"] == "interrupted"


def test_nodes_are_summed_over_rounds(desk: Desk, operator: TestClient) -> None:
    with open_run(desk) as store:
        store.event("joined", "client 0", node=0, device={"platform": "Linux", "memory_bytes": 8e9})
        store.event("quarantine", "olive asked for quarantine", node=2)
        for number, seconds in ((1, 2.0), (2, 4.0)):
            rows = [
                NodeRound(
                    round=number, node=0, status="accepted", compute_seconds=seconds, loss=1.0 / number
                ),
                NodeRound(round=number, node=1, status="late", reason="no reply before the deadline"),
                NodeRound(round=number, node=2, status="accepted", examples=8),
            ]
            entries = [
                Entry(number, 0, "up", "fit", "payload", 70),
                Entry(number, 0, "down", "fit", "payload", 30),
            ]
            store.round(Round(round=number), rows, entries)
        found = operator.get("/api/runs/live/nodes").json()
    zero, one, two = found
    assert (zero["state"], zero["compute_seconds"], zero["loss"]) == ("ok", 3.0, 0.5)
    assert (zero["bytes_up"], zero["bytes_down"], zero["device"]["platform"]) == (140, 60, "Linux")
    assert (one["state"], one["late"], one["last_seen_at"]) == ("failing", 2, None)
    assert one["reason"] == "no reply before the deadline"
    assert two["state"] == "quarantined"


def test_commands_reach_the_run_and_both_audit_logs(desk: Desk, operator: TestClient) -> None:
    with open_run(desk) as store:
        assert operator.post("/api/runs/live/commands", json={"kind": "pause"}).status_code == 202
        body = {"kind": "quarantine", "node": 2}
        assert operator.post("/api/runs/live/commands", json=body).status_code == 202
        taken = [(c.kind, c.by, c.arguments) for c in store.take_commands()]
    assert taken == [("pause", "olive", {}), ("quarantine", "olive", {"node": 2})]
    assert [line["action"] for line in operator.get("/api/runs/live/audit").json()] == ["pause", "quarantine"]
    noted = operator.get("/api/audit").json()[:2]
    assert [(line["who"], line["action"], line["run"]) for line in noted] == [
        ("olive", "quarantine", "live"), ("olive", "pause", "live")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"kind": "dance"}, 422, "kind"),
        ({"kind": "quarantine"}, 422, "quarantine needs node"),
        ({"kind": "pause", "node": 1}, 422, "pause takes no node"),
        ({"kind": "quarantine", "node": 3}, 404, "its nodes are 0 to 2"),
        ({"kind": "pause", "extra": 1}, 422, "extra"),
    ],
)
def test_orders_that_make_no_sense_say_why(
    desk: Desk, operator: TestClient, body: dict[str, Any], status: int, says: str
) -> None:
    with open_run(desk) as store:
        answer = operator.post("/api/runs/live/commands", json=body)
        assert answer.status_code == status
        assert says in answer.json()["detail"]
        assert store.take_commands() == []


def test_a_run_that_is_over_takes_no_orders(desk: Desk, operator: TestClient) -> None:
    make_run(desk.root / "a")
    answer = operator.post("/api/runs/a/commands", json={"kind": "pause"})
    assert answer.status_code == 409
    assert "a is finished" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["nothing", "..", "%2e%2e", "..%2fa", ".dashboard", "a%00"])
def test_only_runs_have_names(desk: Desk, operator: TestClient, name: str) -> None:
    make_run(desk.root / "a")
    make_run(desk.root.parent / "outside")
    assert operator.get(f"/api/runs/{name}/config").status_code == 404


def test_rounds_answers_events_traffic_config(desk: Desk, operator: TestClient) -> None:
    make_run(desk.root / "a")
    assert [row["round"] for row in operator.get("/api/runs/a/rounds?after=1").json()] == [2, 3]
    answers = operator.get("/api/runs/a/answers?round=2").json()
    assert [(row["node"], row["status"]) for row in answers] == [(0, "rejected"), (1, "accepted")]
    assert operator.get("/api/runs/a/traffic?by=direction").json() == [
        {"direction": "down", "bytes": 1800, "dense": 1800},
        {"direction": "up", "bytes": 600, "dense": 2400},
    ]
    assert operator.get("/api/runs/a/events").json()[-1]["kind"] == "finished"
    assert operator.get("/api/runs/a/config").json()["clients"] == 3
    assert operator.get("/api/runs/a/traffic?by=password").status_code == 422


def test_downloads(desk: Desk, operator: TestClient) -> None:
    run = make_run(desk.root / "a")
    missing = operator.get("/api/runs/a/files/adapter.zip")
    assert (missing.status_code, "no result yet" in missing.json()["detail"]) == (404, True)
    (run.folder / "adapter").mkdir()
    (run.folder / "adapter" / "adapter_config.json").write_text("{}")
    answer = operator.get("/api/runs/a/files/adapter.zip")
    packed = zipfile.ZipFile(io.BytesIO(answer.content))
    assert packed.namelist() == ["adapter/adapter_config.json"]
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''a-adapter.zip"
    rows = list(csv.DictReader(io.StringIO(operator.get("/api/runs/a/files/rounds.csv").text)))
    assert [float(row["accuracy"]) for row in rows] == [0.5, 0.7, 0.9]
    rows = list(csv.DictReader(io.StringIO(operator.get("/api/runs/a/files/answers.csv").text)))
    assert (len(rows), rows[0]["reason"]) == (6, "norm <9> exceeds 5")
    assert json.loads(operator.get("/api/runs/a/files/summary.json").content) == run.summary
    assert operator.get("/api/runs/a/files/run.db").status_code == 422


def test_rolling_back_forgets_what_came_later(
    desk: Desk, operator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(Launcher, "go_on", lambda self, name: started.append(name))
    run = make_run(desk.root / "a")
    for number in (2, 3):
        (run.folder / "checkpoints" / f"round-{number:06d}").mkdir(parents=True)
    assert operator.get("/api/runs/a/checkpoints").json() == [2, 3]
    assert operator.post("/api/runs/a/continue", json={"round": 1}).status_code == 404
    assert operator.post("/api/runs/a/continue", json={}).status_code == 409
    assert operator.post("/api/runs/a/continue", json={"round": 2}).status_code == 202
    assert started == ["a"]
    assert [record.round for record in Run(run.folder).rounds()] == [1, 2]
    assert operator.get("/api/runs/a/checkpoints").json() == [2]
    assert operator.get("/api/runs/a/audit").json()[-1]["detail"] == "from round 2"


def test_node_logs_are_read_by_node_and_by_what_is_new(desk: Desk, operator: TestClient) -> None:
    with open_run(desk) as store:
        assert operator.get("/api/runs/live/logs").json() == []
        for node in (0, 1, 0):
            store.node_log(node, f"node {node}: worker ready", round=1)
        rows = operator.get("/api/runs/live/logs?node=0").json()
        assert [row["lines"] for row in rows] == ["node 0: worker ready"] * 2
        assert operator.get(f"/api/runs/live/logs?after={rows[0]['id']}").json()[-1] == rows[1]


def test_forgetting_a_node_leaves_the_totals(desk: Desk, operator: TestClient) -> None:
    run = make_run(desk.root / "a")
    with RunStore.open(run.folder) as store:
        store.node_log(0, "kept", round=1)
        store.node_log(1, "gone", round=1)
    before = operator.get("/api/runs/a").json()
    assert operator.post("/api/runs/a/nodes/1/forget").status_code == 200
    assert [node["node"] for node in operator.get("/api/runs/a/nodes").json()] == [0]
    assert {row.node for row in run.nodes()} == {0}
    assert [row.lines for row in run.node_logs()] == ["kept"]
    after = operator.get("/api/runs/a").json()
    assert (before["bytes_up"], before["bytes_down"]) == (after["bytes_up"], after["bytes_down"])
    assert operator.post("/api/runs/a/nodes/1/forget").status_code == 404


def test_a_damaged_run_is_shown_not_hidden(desk: Desk, operator: TestClient) -> None:
    (desk.root / "broken").mkdir()
    (desk.root / "broken" / FILE).write_bytes(b"not a database, but long enough to look like one" * 20)
    row = operator.get("/api/runs").json()[0]
    assert (row["state"], "damaged" in row["reason"]) == ("unreadable", True)


def test_a_run_seen_between_its_database_and_its_summary_is_starting(
    desk: Desk, operator: TestClient
) -> None:
    with open_run(desk) as store:
        (store.folder / "summary.json").unlink()
        assert operator.get("/api/runs").json()[0]["state"] == "starting"
    row = operator.get("/api/runs").json()[0]
    assert (row["state"], "fedllm resume" in row["reason"]) == ("unreadable", True)


def test_metrics_say_what_the_store_says(desk: Desk, operator: TestClient) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    make_run(desk.root / "a")
    with open_run(desk) as store:
        rows = [NodeRound(round=1, node=0, status="accepted", compute_seconds=1.5)]
        store.round(Round(round=1), rows, [Entry(1, 0, "up", "fit", "payload", 70)])
        text = operator.get("/metrics").text
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["fedllm_run_bytes_total", (("direction", "up"), ("run", "a"))] == 600
    assert samples["fedllm_runs", (("state", "finished"),)] == 1
    assert samples["fedllm_node_bytes_total", (("direction", "up"), ("node", "0"), ("run", "live"))] == 70
    assert samples["fedllm_node_compute_seconds", (("node", "0"), ("run", "live"))] == 1.5
    assert not [key for key in samples if ("run", "a") in key[1] and "node" in dict(key[1])]
    assert samples["fedllm_disk_free_bytes", ()] > 0


def test_every_operation_says_what_it_does(operator: TestClient) -> None:
    document = operator.get("/api/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) > 25
    for operation in operations:
        assert operation["description"].endswith((".", "?"))
        assert {"401", "403", "404", "409", "422"} <= set(operation["responses"])
