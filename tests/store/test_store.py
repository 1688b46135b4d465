"""The run folder: its contract, its errors, its readers."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from fedllm.config import RunConfig, ServerConfig
from fedllm.errors import StoreError
from fedllm.runs.folder import write_partition
from fedllm.runs.ledger import Entry
from fedllm.runs.provenance.identity import provenance
from fedllm.runs.reader import Run, find
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.runs.writer import RunStore

CONFIG = RunConfig(
    name="trial", clients=4, rounds=3, seed=7, server=ServerConfig(sample=2), options={"mu": 0.5}
)

SUMMARY_OF_DESIGN = json.loads(
    """{"schema": 1, "name": "", "status": "finished", "method": "fedavg|lora|fwdllm|fedkd", "model": "",
 "dataset": "", "seed": 0, "clients": 10, "rounds": 10,
 "metrics": {"accuracy": 0.0, "macro_f1": 0.0, "loss": 0.0, "perplexity": null, "warm_accuracy": null},
 "best": {"accuracy": 0.0, "round": 0, "metric": "", "value": 0.0}, "fairness": null, "ended_early": null,
 "bytes": {"up": 0, "down": 0, "setup_up": 0, "up_per_client_round": 0.0, "dense_up": 0, "dense_down": 0,
           "reference_total": 0, "wire_up": null, "wire_down": null},
 "seconds": {"total": 0.0, "client_compute": 0.0, "overhead": 0.0, "simulated": null},
 "memory": {"peak_rss_bytes": 0}, "passes": {"forward": 0, "backward": 0},
 "privacy": {"epsilon": null, "delta": null}, "failures": 0, "rejected": 0,
 "state_sha256": "hash of the final global trainable tensors, name-sorted, raw bytes"}"""
)
LINE_OF_DESIGN = [
    "round", "accuracy", "macro_f1", "loss", "bytes_up", "bytes_down", "seconds", "participants", "failures",
    "rejected", "peak_rss_bytes",
]  # fmt: skip


def _keys(document: object) -> object:
    return {k: _keys(v) for k, v in document.items()} if isinstance(document, dict) else None


def entries(round: int, nodes: tuple[int, ...] = (0, 2)) -> list[Entry]:
    kind = "fit" if round else "setup"
    up = [Entry(round, node, "up", kind, "update", 10 + round, 100) for node in nodes]
    return up + [Entry(round, node, "down", kind, "instruction", 7) for node in nodes]


def commit(store: RunStore, round: int, **values: object) -> RoundRecord:
    facts: dict[str, object] = {
        "metrics": {"accuracy": 0.5 + round / 10, "loss": 1.0 / (round + 1)},
        **values,
    }
    nodes = [
        NodeRound(round=round, node=0, status="accepted", loss=0.3, examples=5),
        NodeRound(round=round, node=2, status="rejected", reason="update norm 9.1 exceeds 5"),
    ]
    record = RoundRecord(round=round, participants=1, rejected=1, client_compute=0.001, **facts)  # type: ignore[arg-type]
    return store.round(record, nodes, entries(round))


def texts(folder: Path) -> tuple[list[dict[str, object]], dict[str, dict[str, object]]]:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "summary.json").read_text())


def test_summary_has_exactly_the_keys_of_schema_1_from_the_first_moment(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        _, summary = texts(store.folder)
        assert _keys(summary) == _keys(SUMMARY_OF_DESIGN)
        assert summary["status"] == "running"
        commit(store, 1)
        assert list(texts(store.folder)[0][0]) == LINE_OF_DESIGN
        store.finish("finished")
        assert _keys(texts(store.folder)[1]) == _keys(SUMMARY_OF_DESIGN)


def test_summary_says_what_happened(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 0, metrics={"accuracy": 0.4})
        commit(store, 1, metrics={"accuracy": 0.9, "loss": 0.2}, peak_rss_bytes=50, forward=3, backward=2.5)
        commit(
            store,
            2,
            metrics={"accuracy": 0.8, "macro_f1": 0.7, "loss": 0.3},
            peak_rss_bytes=40,
            forward=1,
            failures=2,
        )
        commit(store, 3, metrics={}, reference_bytes=1000, epsilon=2.0, delta=1e-5, state_sha256="ab")
        summary = store.finish("finished", wire_up=99)
    assert summary == texts(tmp_path / "run")[1]
    seconds = summary.pop("seconds")
    assert seconds["client_compute"] == pytest.approx(0.004)
    assert seconds["overhead"] == pytest.approx(max(0.0, seconds["total"] - 0.004))
    assert summary == {
        "schema": 1, "name": "trial", "status": "finished", "method": "lora", "model": "minilm",
        "dataset": "bbcnews", "seed": 7, "clients": 4, "rounds": 3,
        "metrics": {
            "accuracy": 0.8, "macro_f1": 0.7, "loss": 0.3, "perplexity": None, "warm_accuracy": 0.4,
        },
        "best": {"accuracy": 0.9, "round": 1, "metric": "accuracy", "value": 0.9},
        "fairness": None,
        "ended_early": None,
        # two nodes, rounds 0 to 3: up 10, 11, 12, 13 each; down 7 each, nothing dense about it
        "bytes": {"up": 92, "down": 56, "setup_up": 20, "up_per_client_round": 12.0, "dense_up": 800,
                  "dense_down": 56, "reference_total": 1000, "wire_up": 99, "wire_down": None},
        "memory": {"peak_rss_bytes": 50}, "passes": {"forward": 4, "backward": 2.5},
        "privacy": {"epsilon": 2.0, "delta": 1e-5}, "failures": 2, "rejected": 4, "state_sha256": "ab",
    }  # fmt: skip


def test_the_starting_point_is_a_round_like_any_other(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        store.round(RoundRecord(round=0, metrics={"accuracy": 0.6, "loss": 2.0}), [], entries(0))
        commit(store, 1, metrics={"accuracy": 0.5, "loss": 3.0})
    lines, summary = texts(tmp_path / "run")
    assert [list(line) for line in lines] == [LINE_OF_DESIGN] * 2
    assert [line["accuracy"] for line in lines] == [0.6, 0.5]
    assert [line["bytes_up"] for line in lines] == [20, 22]
    assert [record.round for record in Run(tmp_path / "run").rounds()] == [0, 1]
    # The newest is the last, the best may be where training started, and nobody has warmed anything.
    told = {key: value for key, value in summary["metrics"].items() if value is not None}
    assert told == {"accuracy": 0.5, "loss": 3.0}
    assert summary["best"] == {"accuracy": 0.6, "round": 0, "metric": "accuracy", "value": 0.6}


def test_runs_of_earlier_versions_have_their_starting_point(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        store.round(RoundRecord(round=0, details={"initial": {"accuracy": 0.25, "loss": 1.5}}))
        commit(store, 1)
    (start, first) = Run(tmp_path / "run").rounds()
    assert (start.metrics, start.details) == ({"accuracy": 0.25, "loss": 1.5}, {})
    assert first.metrics["accuracy"] == 0.6
    RunStore.open(tmp_path / "run").close()
    assert texts(tmp_path / "run")[0][0]["accuracy"] == 0.25


BEST: dict[str, tuple[dict[str, object], list[dict[str, float]], dict[str, object]]] = {
    "lowest": (
        {"model": {"task": "causal"}},
        [{"perplexity": 9.0}, {"perplexity": 7.0}, {"perplexity": 8.0}],
        {"round": 1, "metric": "perplexity", "value": 7.0, "accuracy": None},
    ),
    "earliest of equals": (
        {},
        [{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": 0.75}, {"accuracy": 0.25}],
        {"round": 1, "metric": "accuracy", "value": 0.75, "accuracy": 0.75},
    ),
    "by another metric": (
        {"evaluation": {"metric": "macro_f1"}},
        [{"accuracy": 0.75, "macro_f1": 0.25}, {"accuracy": 0.5, "macro_f1": 0.5}],
        {"round": 1, "metric": "macro_f1", "value": 0.5, "accuracy": 0.5},
    ),
    "no number is none": (
        {"evaluation": {"metric": "loss"}},
        [{"loss": float("nan")}, {"loss": 2.0, "accuracy": 0.5}, {"loss": float("-inf")}],
        {"round": 1, "metric": "loss", "value": 2.0, "accuracy": 0.5},
    ),
    "nothing measured": (
        {},
        [{}, {}],
        {"round": None, "metric": "accuracy", "value": None, "accuracy": None},
    ),
}


@pytest.mark.parametrize("case", BEST)
def test_the_best_round_is_that_of_the_metric_that_decides(tmp_path: Path, case: str) -> None:
    sections, scores, best = BEST[case]
    folder = tmp_path / "run"
    with RunStore.create(folder, RunConfig.model_validate({"name": "trial", **sections})) as store:
        for number, metrics in enumerate(scores):
            store.round(RoundRecord(round=number, metrics=metrics))
    assert texts(folder)[1]["best"] == best
    # Read back, where null stands for what is no number, it is the same.
    RunStore.open(folder).close()
    assert texts(folder)[1]["best"] == best
    found = Run(folder).best
    assert (found and found.round, found and found.value) == (best["round"], best["value"])


def test_tries_are_counted_from_where_more_rounds_were_last_given(
    tmp_path: Path,
) -> None:
    config = RunConfig.model_validate({"name": "trial", "rounds": 4, "evaluation": {"patience": 9}})
    with RunStore.create(tmp_path / "run", config) as store:
        for number in range(5):  # the starting point is the best
            store.round(RoundRecord(round=number, metrics={"accuracy": 0.5 - number / 10}))
        assert store.tries == 4
        store.extend(6)
        assert store.tries == 0
        store.truncate(1)
        store.extend(6)
        for number in (2, 3):
            store.round(RoundRecord(round=number, metrics={"accuracy": 0.1}))
        assert store.tries == 2
    with RunStore.open(tmp_path / "run") as store:
        assert store.tries == 2


def test_every_metric_that_is_measured_is_told(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1, metrics={"loss": 1.5, "perplexity": 4.5, "spearman": 0.25})
    lines, summary = texts(tmp_path / "run")
    told = {key: value for key, value in summary["metrics"].items() if value is not None}
    assert told == {"loss": 1.5, "perplexity": 4.5, "spearman": 0.25}
    assert (lines[0]["perplexity"], lines[0]["spearman"]) == (4.5, 0.25)


def test_overhead_is_unknown_where_clients_compute_side_by_side(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG, workers=2) as store:
        assert store.summary()["seconds"]["overhead"] is None


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1, metrics={"accuracy": 0.2, "loss": float("nan")})
    lines, summary = texts(tmp_path / "run")
    assert lines[0]["loss"] is None
    assert summary["metrics"]["loss"] is None


def test_configuration_and_provenance_read_back(tmp_path: Path) -> None:
    facts = provenance(engine="loopback")
    with RunStore.create(tmp_path / "run", CONFIG, facts):
        run = Run(tmp_path / "run")
        assert run.config == CONFIG
        assert run.provenance == facts
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text()) == CONFIG.to_document()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert facts["git"] is None or facts["git"]["commit"] == head.stdout.strip()


def test_partition_counts_classes_per_client(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        write_partition(store.folder, [[0, 3], [1, 2]], [0, 1, 1, 1], ["sport", "tech"], [2, 5])
    assert Run(tmp_path / "run").partition == {
        "label_names": ["sport", "tech"],
        "clients": [
            {"node": 0, "examples": 2, "labels": [1, 1], "indices": [0, 3]},
            {"node": 1, "examples": 2, "labels": [0, 2], "indices": [1, 2]},
        ],
        "held_out": [2, 5],
    }


def test_truncate_forgets_later_rounds_everywhere(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1)
        expected = store.summary()
        commit(store, 2)
        commit(store, 3)
        store.finish("failed", reason="quorum lost")
    with RunStore.open(tmp_path / "run") as store:
        store.truncate(1)
        assert store.last_round == 1
        summary = store.summary()
        for part in ("status", "metrics", "best", "bytes", "rejected"):
            assert summary[part] == expected[part]
        assert [line["round"] for line in texts(store.folder)[0]] == [1]
        run = Run(store.folder)
        assert {row.round for row in run.nodes()} == {1}
        assert {row["round"] for row in run.traffic()} == {1}
        commit(store, 2)
        assert [line["round"] for line in texts(store.folder)[0]] == [1, 2]
        with pytest.raises(StoreError, match=r"knows rounds up to 2 only, not 5"):
            store.truncate(5)


def test_texts_are_made_anew_from_the_database(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1)
        commit(store, 2)
        good = (store.folder / "rounds.jsonl").read_bytes()
    (tmp_path / "run" / "rounds.jsonl").write_bytes(good[:-9])
    (tmp_path / "run" / "summary.json").unlink()
    RunStore.open(tmp_path / "run").close()
    assert (tmp_path / "run" / "rounds.jsonl").read_bytes() == good
    assert texts(tmp_path / "run")[1]["bytes"]["up"] == 46


def test_seconds_add_up_over_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        clock[0] += 5
        commit(store, 1)
        clock[0] += 2  # lost in a crash: nobody wrote it down
    clock[0] += 1000
    with RunStore.open(tmp_path / "run") as store:
        store.truncate(1)
        clock[0] += 30
        assert store.finish("finished")["seconds"]["total"] == 35
        clock[0] += 7
        assert store.summary()["seconds"]["total"] == 35
    with RunStore.open(tmp_path / "run") as store:
        assert store.summary()["seconds"]["total"] == 35


def test_rounds_come_in_order_with_their_own_rows(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1)
        with pytest.raises(StoreError, match="round 3 cannot follow round 1"):
            commit(store, 3)
        with pytest.raises(StoreError, match="round 2 was given rows of round 1"):
            store.round(RoundRecord(round=2), [], entries(1))
        assert store.last_round == 1


def test_a_round_enters_wholly_or_not_at_all(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1)
        before = store.summary()["bytes"]
        broken = [Entry(2, 0, "up", "fit", "update", None)]  # type: ignore[arg-type]
        with pytest.raises((StoreError, TypeError)):
            store.round(RoundRecord(round=2), [NodeRound(round=2, node=0, status="late")], broken)
        assert store.summary()["bytes"] == before
        run = Run(store.folder)
        assert [record.round for record in run.rounds()] == [1]
        assert {row.round for row in run.nodes()} == {1}
        commit(store, 2)


def test_a_full_disk_is_one_sentence_and_the_run_stays_whole(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1)
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be full
        many = [NodeRound(round=2, node=n, status="late", reason="x" * 500) for n in range(100)]
        with pytest.raises(StoreError, match=r"^disk full at .*: free space, then fedllm resume .*/run$"):
            store.round(RoundRecord(round=2), many)
        store._connection.execute("PRAGMA max_page_count = 1000000")
        assert store.last_round == 1
        store.round(RoundRecord(round=2), many)
    assert [record.round for record in Run(tmp_path / "run").rounds()] == [1, 2]


@pytest.mark.slow
def test_a_running_folder_is_refused_with_the_pid(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1)
        code = (
            "import sys, pathlib; from fedllm.runs.writer import RunStore;"
            "RunStore.open(pathlib.Path(sys.argv[1]))"
        )
        done = subprocess.run([sys.executable, "-c", code, str(store.folder)], capture_output=True, text=True)
        assert f"is being run by process {os.getpid()}" in done.stderr
        assert done.returncode == 1
        assert Run(store.folder).pid == os.getpid()
        assert Run(store.folder).status == "running"
    assert Run(tmp_path / "run").pid is None
    assert Run(tmp_path / "run").status == "interrupted"
    RunStore.open(tmp_path / "run").close()


@pytest.mark.slow
def test_a_forked_child_does_not_keep_the_folder(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", CONFIG)
    code = (
        "import os, sys, pathlib, time\n"
        "from fedllm.runs.writer import RunStore\n"
        "store = RunStore.open(pathlib.Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(3600)\n"
        "print(child, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    store.close()
    done = subprocess.Popen(
        [sys.executable, "-c", code, str(store.folder)], stdout=subprocess.PIPE, text=True
    )
    assert done.stdout is not None
    child = int(done.stdout.readline())
    done.wait()
    try:
        RunStore.open(store.folder).close()
    finally:
        os.kill(child, 9)
        done.stdout.close()


def test_create_does_not_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunStore.create(folder, CONFIG) as store:
        commit(store, 1)
    with pytest.raises(StoreError, match=r"not finished \(running\): continue it with fedllm resume"):
        RunStore.create(folder, CONFIG)
    with RunStore.open(folder) as store:
        store.finish("finished")
    with pytest.raises(StoreError, match="holds a finished run: choose another --out, or give --overwrite"):
        RunStore.create(folder, CONFIG)
    (folder / "adapter").mkdir()
    with RunStore.create(folder, CONFIG, overwrite=True) as store:
        assert store.last_round == 0
        assert not (folder / "adapter").exists()
        assert Run(folder).rounds() == []


@pytest.mark.parametrize("name", ["thesis.tex", "config.toml", "model", "checkpoints"])
def test_create_leaves_other_peoples_folders_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(StoreError, match=f"holds other things .{name}.: choose another --out"):
        RunStore.create(tmp_path, CONFIG, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(StoreError, match="is a file, a run needs a folder"):
        RunStore.create(tmp_path / name, CONFIG)


def test_overwrite_spares_what_no_run_wrote(tmp_path: Path) -> None:
    RunStore.create(tmp_path, CONFIG).close()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds other things \(notes.txt\)"):
        RunStore.create(tmp_path, CONFIG, overwrite=True)
    assert Run(tmp_path).config == CONFIG


def test_no_run_damaged_run_newer_run(tmp_path: Path) -> None:
    for call in (RunStore.open, Run):
        with pytest.raises(StoreError, match=r"holds no run: run.db is missing"):
            call(tmp_path)
    RunStore.create(tmp_path / "new", CONFIG).close()
    with sqlite3.connect(tmp_path / "new" / "run.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="has schema 99, this fedllm reads 1"):
        RunStore.open(tmp_path / "new")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match=r"run.db is damaged"):
        Run(tmp_path / "bad")
    with pytest.raises(StoreError, match=r"run.db is damaged"):
        RunStore.create(tmp_path / "bad", CONFIG, overwrite=True)


def test_readers_see_whole_rounds_while_the_run_writes(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path / "run", CONFIG)
    run, seen, done = Run(tmp_path / "run"), [], threading.Event()

    def read() -> None:
        while not done.is_set():
            last = run.rounds()[-1:]
            nodes = run.nodes(round=last[0].round) if last else []
            traffic = run.traffic(("direction",), round=last[0].round) if last else []
            seen.append((last, len(nodes), [row["bytes"] for row in traffic]))
            assert run.summary["schema"] == 1

    reader = threading.Thread(target=read)
    reader.start()
    for round in range(1, 41):
        commit(store, round)
    done.set()
    reader.join()
    store.close()
    for last, nodes, traffic in seen:
        if last:
            assert nodes == 2
            assert traffic == [last[0].bytes_down, last[0].bytes_up]
    assert len(seen) > 3


def test_commands_reach_the_run_once_and_leave_a_trace(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        run = Run(store.folder)
        assert store.take_commands() == []
        run.post_command("pause", by="ada")
        run.post_command("quarantine", by="bob", node=3)
        run.audit("ada", "login", "from 127.0.0.1")
        taken = store.take_commands()
        assert [(c.kind, c.by, c.arguments) for c in taken] == [
            ("pause", "ada", {}),
            ("quarantine", "bob", {"node": 3}),
        ]
        assert store.take_commands() == []
        log = [(row["who"], row["action"], row["detail"]) for row in run.audit_log()]
        assert log == [
            ("ada", "pause", "{}"),
            ("bob", "quarantine", '{"node": 3}'),
            ("ada", "login", "from 127.0.0.1"),
        ]


def test_events_and_phase(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        run = Run(store.folder)
        assert run.phase == {}
        store.phase("waiting", round=1, have=1, need=2)
        assert {k: run.phase[k] for k in ("name", "round", "have", "need")} == {
            "name": "waiting", "round": 1, "have": 1, "need": 2,
        }  # fmt: skip
        store.event("rejected", "node 3: update norm 9.1 exceeds 5", round=1, node=3)
        store.finish("failed", reason="quorum lost in round 2")
        assert run.phase == {}
        events = run.events()
        assert [(e.kind, e.message, e.fields) for e in events] == [
            ("rejected", "node 3: update norm 9.1 exceeds 5", {"node": 3}),
            ("failed", "quorum lost in round 2", {}),
        ]
        assert run.events(after=events[0].id) == events[1:]
        assert run.newest_events() == events
        assert run.newest_events(limit=1) == events[-1:]


def test_traffic_agrees_with_plain_sql(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        commit(store, 1)
        commit(store, 2)
    run = Run(tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "run.db") as connection:
        rows = connection.execute("SELECT node, bytes FROM ledger WHERE direction = 'up'").fetchall()
    connection.close()
    expected = {node: sum(b for n, b in rows if n == node) for node in (0, 2)}
    got = {
        row["node"]: row["bytes"] for row in run.traffic(("node", "direction")) if row["direction"] == "up"
    }
    assert got == expected
    with pytest.raises(ValueError, match="no such ledger column"):
        run.traffic(("bytes; DROP TABLE ledger",))


def test_find_lists_run_folders(tmp_path: Path) -> None:
    for name in ("b", "a"):
        RunStore.create(tmp_path / name, CONFIG).close()
    (tmp_path / "c").mkdir()
    assert find(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(StoreError, match="is not a folder of runs"):
        find(tmp_path / "missing")
