"""The JSON API against runs whose numbers were chosen by hand."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.runs.ledger import Entry
from fedllm.runs.records import FILE, NodeRound, RoundRecord
from fedllm.runs.writer import RunStore
from server.dashboard.actions.launch import Launcher
from server.dashboard.actions.operations import Operations
from tests.dashboard.client import TestClient
from tests.reports.made_up import make_run


def open_run(ops: Operations, name: str = "live", **config: Any) -> RunStore:
    """A run that goes on for as long as the store is open."""
    return RunStore.create(ops.root / name, RunConfig(name=name, clients=3, rounds=5, **config))


def test_the_list_says_how_every_run_stands(ops: Operations, operator: TestClient) -> None:
    make_run(ops.root / "good", model={"name": "minilm"})
    make_run(ops.root / "bad", accuracies=(0.5,), status="failed")
    make_run(ops.root / "gone", accuracies=(0.5,), status="running")
    with open_run(ops) as store:
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


def test_a_round_shows_at_the_next_request(ops: Operations, operator: TestClient) -> None:
    with open_run(ops) as store:
        assert operator.get("/api/runs/live").json()["round"] == 0
        for number in (1, 2):
            store.round(RoundRecord(round=number, metrics={"accuracy": 0.1 * number}, seconds=4.0))
            view = operator.get("/api/runs/live").json()
            assert (view["round"], view["seconds_left"]) == (number, pytest.approx(4.0 * (5 - number)))
    assert operator.get("/api/runs/live").json()["state"] == "interrupted"


def test_nodes_are_summed_over_rounds(ops: Operations, operator: TestClient) -> None:
    with open_run(ops) as store:
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
            store.round(RoundRecord(round=number), rows, entries)
        found = operator.get("/api/runs/live/nodes").json()
    zero, one, two = found
    assert (zero["state"], zero["compute_seconds"], zero["loss"]) == ("ok", 3.0, 0.5)
    assert (zero["bytes_up"], zero["bytes_down"], zero["device"]["platform"]) == (140, 60, "Linux")
    assert (one["state"], one["late"], one["last_seen_at"]) == ("late", 2, None)
    assert one["reason"] == "no reply before the deadline"
    assert two["state"] == "quarantined"


def test_commands_reach_the_run_and_both_audit_logs(ops: Operations, operator: TestClient) -> None:
    with open_run(ops) as store:
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
    ops: Operations, operator: TestClient, body: dict[str, Any], status: int, says: str
) -> None:
    with open_run(ops) as store:
        answer = operator.post("/api/runs/live/commands", json=body)
        assert answer.status_code == status
        assert says in answer.json()["detail"]
        assert store.take_commands() == []


def test_a_run_that_is_over_takes_no_orders(ops: Operations, operator: TestClient) -> None:
    make_run(ops.root / "a")
    answer = operator.post("/api/runs/a/commands", json={"kind": "pause"})
    assert answer.status_code == 409
    assert "a is finished" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["nothing", "..", "%2e%2e", "..%2fa", ".dashboard", "a%00"])
def test_only_runs_have_names(ops: Operations, operator: TestClient, name: str) -> None:
    make_run(ops.root / "a")
    make_run(ops.root.parent / "outside")
    assert operator.get(f"/api/runs/{name}/config").status_code == 404


def test_rounds_answers_events_traffic_config(ops: Operations, operator: TestClient) -> None:
    make_run(ops.root / "a")
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


def test_downloads(ops: Operations, operator: TestClient) -> None:
    run = make_run(ops.root / "a")
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


def test_the_adapter_is_that_of_a_checkpoint(
    ops: Operations, operator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(self: Launcher, name: str, round: int, place: Path) -> None:
        (place / "adapter").mkdir(parents=True)
        (place / "adapter" / "round").write_text(f"{name} after {round}")

    def adapter(query: str = "") -> str:
        answer = operator.get(f"/api/runs/a/files/adapter.zip{query}")
        assert answer.status_code == 200
        return zipfile.ZipFile(io.BytesIO(answer.content)).read("adapter/round").decode()

    monkeypatch.setattr(Launcher, "export", export)
    run = make_run(ops.root / "a", status="stopped")
    for number in (2, 3):
        (run.folder / "checkpoints" / f"round-{number:06d}").mkdir(parents=True)
        (run.folder / "checkpoints" / f"round-{number:06d}" / "state.json").write_text("{}")
    assert (adapter(), adapter("?round=2"), adapter("?round=3")) == ("a after 3", "a after 2", "a after 3")
    (run.folder / "adapter").mkdir()
    (run.folder / "adapter" / "round").write_text("the result")
    assert (adapter(), adapter("?round=3"), adapter("?round=2")) == ("the result", "the result", "a after 2")
    answer = operator.get("/api/runs/a/files/adapter.zip?round=1")
    assert (answer.status_code, answer.json()["detail"]) == (
        404,
        "a has no checkpoint of round 1; its checkpoints are 2, 3",
    )
    assert operator.get("/api/runs/a/files/rounds.csv?round=2").status_code == 404


def test_the_best_adapter_is_that_of_the_best_round(
    ops: Operations, operator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(self: Launcher, name: str, round: int, place: Path) -> None:
        (place / "adapter").mkdir(parents=True)
        (place / "adapter" / "round").write_text(f"{name} after {round}")

    def fetch() -> Any:
        return operator.get("/api/runs/a/files/adapter-best.zip")

    monkeypatch.setattr(Launcher, "export", export)
    run = make_run(ops.root / "a", (0.5, 0.9, 0.9, 0.7), status="stopped")
    told = operator.get("/api/runs/a").json()
    assert (told["value"], told["best"], told["best_round"]) == (0.7, 0.9, 2)
    for number in (3, 4):
        (run.folder / "checkpoints" / f"round-{number:06d}").mkdir(parents=True)
    assert (fetch().status_code, fetch().json()["detail"]) == (
        404,
        "a has no checkpoint of round 2; its checkpoints are 3, 4",
    )
    (run.folder / "checkpoints" / "round-000002").mkdir()
    (run.folder / "checkpoints" / "round-000002" / "state.json").write_text("{}")
    assert zipfile.ZipFile(io.BytesIO(fetch().content)).read("adapter/round") == b"a after 2"
    (run.folder / "adapter-best").mkdir()
    (run.folder / "adapter-best" / "round").write_text("the best")
    answer = fetch()
    assert zipfile.ZipFile(io.BytesIO(answer.content)).read("adapter-best/round") == b"the best"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''a-adapter-best.zip"
    make_run(ops.root / "b", metric="loss")
    unmeasured = operator.get("/api/runs/b/files/adapter-best.zip")
    assert (unmeasured.status_code, unmeasured.json()["detail"]) == (
        404,
        "b has measured nothing yet, and so has no best round",
    )


def test_going_back_forgets_nothing_before_the_run_goes_on(
    ops: Operations, operator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int | None] = []
    monkeypatch.setattr(Launcher, "go_on", lambda self, name: started.append(run.goes_on_from))
    run = make_run(ops.root / "a")
    for number in (2, 3):
        (run.folder / "checkpoints" / f"round-{number:06d}").mkdir(parents=True)
    assert operator.get("/api/runs/a/checkpoints").json() == [2, 3]
    assert operator.post("/api/runs/a/continue", json={"round": 1}).status_code == 404
    assert operator.post("/api/runs/a/continue", json={}).status_code == 409
    assert operator.post("/api/runs/a/continue", json={"round": 2}).status_code == 202
    assert started == [2]
    assert [record.round for record in run.rounds()] == [1, 2, 3]
    assert operator.get("/api/runs/a/checkpoints").json() == [2, 3]
    assert operator.get("/api/runs/a/audit").json()[-1]["detail"] == "from round 2"


def test_a_refused_return_leaves_everything_and_a_trace(
    ops: Operations, operator: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Launcher, name: str) -> None:
        raise ConfigError("no SuperLink answers at localhost:8000")

    monkeypatch.setattr(Launcher, "go_on", refuse)
    run = make_run(ops.root / "a", status="failed")
    for number in (2, 3):
        (run.folder / "checkpoints" / f"round-{number:06d}").mkdir(parents=True)
    before = run.rounds(), run.summary
    for request, detail in (({"round": 2}, "from round 2: no SuperLink"), ({}, "no SuperLink")):
        answer = operator.post("/api/runs/a/continue", json=request)
        assert (answer.status_code, answer.json()["detail"][:12]) == (422, "no SuperLink")
        assert (run.rounds(), run.summary) == before
        assert (run.status, run.goes_on_from) == ("failed", None)
        assert operator.get("/api/runs/a/checkpoints").json() == [2, 3]
        noted = operator.get("/api/runs/a/audit").json()[-1]
        assert (noted["action"], noted["detail"]) == ("go on refused", f"{detail} answers at localhost:8000")


def test_node_logs_are_read_by_node_and_by_what_is_new(ops: Operations, operator: TestClient) -> None:
    with open_run(ops) as store:
        assert operator.get("/api/runs/live/logs").json() == []
        for node in (0, 1, 0):
            store.node_log(node, f"node {node}: worker ready", round=1)
        rows = operator.get("/api/runs/live/logs?node=0").json()
        assert [row["lines"] for row in rows] == ["node 0: worker ready"] * 2
        assert operator.get(f"/api/runs/live/logs?after={rows[0]['id']}").json()[-1] == rows[1]


def test_forgetting_a_node_leaves_the_totals(ops: Operations, operator: TestClient) -> None:
    run = make_run(ops.root / "a")
    with RunStore.open(run.folder) as store:
        store.node_log(0, "kept", round=1)
        store.node_log(1, "gone", round=1)
    for node in (0, 1):
        (run.folder / "clients" / str(node)).mkdir(parents=True)
    before = operator.get("/api/runs/a").json()
    assert operator.post("/api/runs/a/nodes/1/forget").status_code == 200
    assert [row["node"] for row in operator.get("/api/runs/a/nodes").json() if row["known"]] == [0]
    assert [client["node"] for client in run.partition["clients"]] == [0, 2]
    assert [path.name for path in (run.folder / "clients").iterdir()] == ["0"]
    assert {row.node for row in run.nodes()} == {0}
    assert [row.lines for row in run.node_logs()] == ["kept"]
    after = operator.get("/api/runs/a").json()
    assert (before["bytes_up"], before["bytes_down"]) == (after["bytes_up"], after["bytes_down"])
    assert operator.post("/api/runs/a/nodes/1/forget").status_code == 404


def test_forgetting_a_node_in_the_middle_is_seen_by_pages(ops: Operations, operator: TestClient) -> None:
    make_run(ops.root / "a")
    seen = ops.index.records_stamp("a")
    assert operator.post("/api/runs/a/nodes/0/forget").status_code == 200
    assert ops.index.records_stamp("a") != seen


def test_a_node_is_not_forgotten_while_the_texts_of_all_lie_in_the_run(
    ops: Operations, operator: TestClient
) -> None:
    run = make_run(ops.root / "a")
    texts = run.folder / "given" / "clients" / "000001.jsonl"
    texts.parent.mkdir(parents=True)
    texts.touch()
    answer = operator.post("/api/runs/a/nodes/1/forget")
    assert (answer.status_code, "given holds the texts of all clients" in answer.text) == (409, True)
    assert 1 in {row.node for row in run.nodes()}
    texts.unlink()
    assert operator.post("/api/runs/a/nodes/1/forget").status_code == 200


def test_a_damaged_run_is_shown_not_hidden(ops: Operations, operator: TestClient) -> None:
    (ops.root / "broken").mkdir()
    (ops.root / "broken" / FILE).write_bytes(b"not a database, but long enough to look like one" * 20)
    row = operator.get("/api/runs").json()[0]
    assert (row["state"], "damaged" in row["reason"]) == ("unreadable", True)


def test_a_run_seen_between_its_database_and_its_summary_is_starting(
    ops: Operations, operator: TestClient
) -> None:
    with open_run(ops) as store:
        (store.folder / "summary.json").unlink()
        assert operator.get("/api/runs").json()[0]["state"] == "starting"
    row = operator.get("/api/runs").json()[0]
    assert (row["state"], "fedllm resume" in row["reason"]) == ("unreadable", True)


def test_metrics_say_what_the_store_says(ops: Operations, operator: TestClient) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    make_run(ops.root / "a")
    with open_run(ops) as store:
        rows = [NodeRound(round=1, node=0, status="accepted", compute_seconds=1.5)]
        store.round(RoundRecord(round=1), rows, [Entry(1, 0, "up", "fit", "payload", 70)])
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


def test_long_lists_come_in_parts(ops: Operations, operator: TestClient) -> None:
    with open_run(ops) as store:
        rows = [NodeRound(round=1, node=node, status="accepted") for node in range(5)]
        store.round(
            RoundRecord(round=1), rows, [Entry(1, node, "up", "fit", "payload", 7) for node in range(5)]
        )
    for path in ("nodes", "answers", "traffic?by=node"):
        url: str | None = f"/api/runs/live/{path}{'&' if '?' in path else '?'}limit=2"
        found = []
        while url is not None:
            answer = operator.get(url)
            assert len(answer.json()) <= 2
            found += [row["node"] for row in answer.json()]
            url = answer.links["next"]["url"] if "next" in answer.links else None
        assert found == [0, 1, 2, 3, 4], path


def test_a_run_that_did_not_start_is_dismissed(
    ops: Operations, operator: TestClient, viewer: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = {"stillborn": "no such file", "slow": ""}
    monkeypatch.setattr(ops.launcher, "starting", lambda: starting)
    monkeypatch.setattr(ops.launcher, "dismiss", starting.pop)
    assert viewer.post("/api/runs/stillborn/dismiss").status_code == 403
    assert operator.post("/api/runs/slow/dismiss").status_code == 409
    assert operator.post("/api/runs/stillborn/dismiss").status_code == 202
    assert [row["name"] for row in operator.get("/api/runs").json()] == ["slow"]
    assert operator.post("/api/runs/stillborn/dismiss").status_code == 404
    assert operator.get("/api/audit").json()[0]["action"] == "dismiss"


def test_a_name_that_no_folder_can_have_is_not_found(operator: TestClient) -> None:
    assert operator.get(f"/api/runs/{'é' * 150}").status_code == 404
