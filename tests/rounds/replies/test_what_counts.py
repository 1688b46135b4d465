"""Which replies count, with what weight, and what is left of those that do not."""

from __future__ import annotations

import itertools
import math
import re
import time
from pathlib import Path

import pytest
import torch

from fedllm.errors import RunFailed
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.runs.summary import fairness_sentence
from fedllm.runs.totals import node_totals
from fedllm.runs.writer import RunStore
from fedllm.tensors import Spec, Tensors, TensorSpec, pack
from server.dashboard.pages import charts
from server.rounds.roster import Member, Roster
from server.rounds.state import ServerState
from simulations.engines.loopback import loopback
from simulations.results import report
from strategies.averaging import MeanAccumulator
from strategies.base import Exchange
from strategies.base import Reply as Counted
from tests.rounds.conftest import LeapingClock
from tests.rounds.scripted import EXAMPLES, Mean, constant, engine_of, grid_of, play, scripted, send


@pytest.mark.parametrize(("quorum", "come"), [(None, 1), (3, 2), (4, 3)])
def test_one_reply_below_the_quorum_is_a_missed_round(quorum: int | None, come: int, tmp_path: Path) -> None:
    config = scripted(server={"quorum": quorum})

    def script(node: int, asked: Instruction) -> Reply | str:
        return send(config, node, asked, constant(1.0)) if node < come else "no time"

    with pytest.raises(RunFailed, match=f"round 1 missed its quorum of {quorum or 2} in 1 attempts.*no time"):
        play(config, tmp_path / "run", script)


@pytest.mark.parametrize(("quorum", "come"), [(None, 2), (3, 3), (1, 1)])
def test_the_quorum_itself_is_enough(quorum: int | None, come: int, tmp_path: Path) -> None:
    config = scripted(server={"quorum": quorum})

    def script(node: int, asked: Instruction) -> Reply | str:
        return send(config, node, asked, constant(1.0)) if node < come else "no time"

    engine = play(config, tmp_path / "run", script)
    assert engine.state.current.tensors["a"].tolist() == [2.0, 2.0]  # one in each of two rounds


@pytest.mark.parametrize("exchanges", [1, 2])
def test_a_missed_quorum_takes_back_what_counted(exchanges: int, tmp_path: Path) -> None:
    """EF21's estimate of a client moves by what it sends: sent twice and counted once, it moves once."""
    codec = {"up": "ef21(top_k(fraction=1.0))"}
    config = scripted(rounds=1, clients=2, codec=codec, server={"quorum": 2, "retries": 1})
    counted = []

    def script(node: int, asked: Instruction) -> Reply | str:
        counted.append((node, asked.index, asked.attempt, asked.counted))
        if node == 1 and (asked.attempt, asked.index) == (0, exchanges - 1):
            return "no time"
        return send(config, node, asked, constant(1.0))

    engine = play(config, tmp_path / "run", script, method=Mean(config, exchanges))
    begun = [at for _, index, _, at in counted if index == 0]
    assert begun == [(0, 0)] * 4  # two clients, two attempts: in neither had they been counted before
    assert counted[-1][2] == 1
    assert engine.state.current.tensors["a"].tolist() == [1.0, 1.0]


def test_the_estimate_of_a_client_moves_by_every_reply_that_counted(tmp_path: Path) -> None:
    """The receiver's half of EF21: a message is what the update has changed by since the last."""
    config = scripted(rounds=3, clients=1, codec={"up": "ef21(top_k(fraction=1.0))"})

    def script(node: int, asked: Instruction) -> Reply:
        return send(config, node, asked, constant(float(asked.round)))

    engine = play(config, tmp_path / "run", script)
    assert engine.state.current.tensors["a"].tolist() == [10.0, 10.0]  # 1 + (1 + 2) + (1 + 2 + 3)


def test_a_reply_that_counted_is_named_in_the_next_round(tmp_path: Path) -> None:
    config = scripted(rounds=2, clients=2, server={"quorum": 1})
    told = {}

    def script(node: int, asked: Instruction) -> Reply | str:
        told[node, asked.round] = asked.counted
        failing = (node, asked.round) == (1, 1)
        return "no time" if failing else send(config, node, asked, constant(1.0))

    play(config, tmp_path / "run", script)
    assert told == {(0, 1): (0, 0), (1, 1): (0, 0), (0, 2): (1, 0), (1, 2): (0, 0)}


def test_updates_and_metrics_are_averaged_by_numbers_of_texts(tmp_path: Path) -> None:
    config = scripted(rounds=1, clients=2)

    def script(node: int, asked: Instruction) -> Reply:
        value = 8.0 * node
        return send(config, node, asked, constant(value), examples=(10, 30)[node], metrics={"loss": value})

    engine = play(config, tmp_path / "run", script)
    assert engine.state.current.tensors["a"].tolist() == [6.0, 6.0]  # (10 * 0 + 30 * 8) / 40
    assert Run(tmp_path / "run").rounds()[-1].details["loss"] == 6.0


def test_what_clients_measure_on_their_own_texts_is_averaged_by_how_many_they_have(tmp_path: Path) -> None:
    config = scripted(rounds=1, clients=2, evaluation={"clients": True}, data={"client_test_fraction": 0.5})

    def script(node: int, asked: Instruction) -> Reply:
        if asked.kind == "evaluate":
            return Reply(asked.round, asked.index, (10, 30)[node], {"accuracy": 0.5 * node})
        return send(config, node, asked, constant(1.0))

    play(config, tmp_path / "run", script)
    assert Run(tmp_path / "run").rounds()[-1].details["clients"] == {"accuracy": 0.375}


def test_what_no_mean_gives_back_is_told_of_each_client_alone(tmp_path: Path) -> None:
    measured = {"evaluation": {"clients": True}, "data": {"client_test_fraction": 0.5}}
    config = scripted(rounds=1, clients=2, model={"task": "tokens"}, **measured)

    def script(node: int, asked: Instruction) -> Reply:
        if asked.kind == "evaluate":
            return Reply(asked.round, asked.index, 10, {"f1": 0.5 * node, "loss": 1.0})
        return send(config, node, asked, constant(1.0))

    play(config, tmp_path / "run", script)
    details = Run(tmp_path / "run").rounds()[-1].details
    assert details["clients"] == {"loss": 1.0}
    assert [details["spread"]["f1"][part] for part in ("clients", "mean", "gap")] == [2, 0.25, 0.5]


def test_how_differently_clients_fare_is_told_everywhere(tmp_path: Path) -> None:
    """A tenth of eleven clients is two; the last one's loss is no number, and 7 tells more than was asked."""
    config = scripted(rounds=2, clients=11, evaluation={"clients": True}, data={"client_test_fraction": 0.5})
    folder = tmp_path / "run"

    def script(node: int, asked: Instruction) -> Reply:
        if asked.kind != "evaluate":
            return send(config, node, asked, constant(1.0), metrics={"loss": 9.0})
        told = {"accuracy": node / 16 if asked.round == 2 else 0.0, "loss": 2.0 - node / 16, "seconds": 1.0}
        if node == 10:
            told["loss"] = float("nan")
        if node == 7:
            told["zeal"] = 5.0
        return Reply(asked.round, asked.index, 10, told)

    play(config, folder, script)
    run = Run(folder)
    fairness = run.summary["fairness"]
    assert (fairness["round"], list(fairness["metrics"])) == (2, ["accuracy", "loss"])
    accuracy, loss = fairness["metrics"]["accuracy"], fairness["metrics"]["loss"]
    assert accuracy == {
        "clients": 11, "mean": 5 / 16, "std": pytest.approx(math.sqrt(10) / 16), "worst_tenth": 0.5 / 16,
        "best_tenth": 9.5 / 16, "gap": 9 / 16,
    }  # fmt: skip
    assert (loss["clients"], loss["worst_tenth"], loss["best_tenth"]) == (10, 2.0, 2.0 - 9 / 16)
    assert RunStore.open(folder).summary()["fairness"] == fairness
    # Each client's own value, in the dashboard and in the report; what it lost in training is another thing.
    nodes = node_totals(folder)
    assert [node.scores["accuracy"] for node in nodes] == [node / 16 for node in range(11)]
    assert {node.loss for node in nodes} == {9.0}
    assert "loss" not in nodes[10].scores
    assert "zeal" not in nodes[7].scores
    curves = charts.quality(run.rounds(), "accuracy", "round")["series"]
    (worst,) = [curve["data"] for curve in curves if "worst" in curve["name"]]
    assert worst == [[1.0, 0.0], [2.0, 0.5 / 16]]
    page = " ".join(re.sub(r"<[^>]*>", " ", report.render(run, {})).split())
    assert f"accuracy 11 0.3125 {math.sqrt(10) / 16:.4g} 0.03125 0.5938 0.5625" in page
    # client 3: accepted four times, no losses; 20 texts trained on, training loss 9, its accuracy, its loss.
    assert "3 4 0 0 0 20 9 0.1875 1.812" in page
    assert fairness_sentence(fairness, config.metric) == (
        "accuracy of 11 clients on their own texts, round 2: 0.3125 +- 0.1976, worst tenth 0.03125, "
        "fairness gap 0.5625"
    )


def test_where_no_client_is_asked_nothing_is_told_of_fairness(tmp_path: Path) -> None:
    config = scripted(rounds=1)
    play(config, tmp_path / "run", lambda node, asked: send(config, node, asked, constant(1.0)))
    run = Run(tmp_path / "run")
    assert run.summary["fairness"] is None
    assert "own texts" not in report.render(run, {})


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.8), (1.1, 0.0), (0.0, 1.1)])
def test_the_norm_of_all_tensors_together_is_bounded(a: float, b: float, tmp_path: Path) -> None:
    """Each of 0.8 is within the bound of 1, both together (1.13) are not."""
    config = scripted(rounds=1, clients=3, server={"max_update_norm": 1.0})

    def script(node: int, asked: Instruction) -> Reply:
        update = constant(0.25)
        if node == 1:
            update["a"] *= 0.0
            update["a"][0], update["b"][0] = a, b
        return send(config, node, asked, update)

    engine = play(config, tmp_path / "run", script)
    (row,) = [row for row in Run(tmp_path / "run").nodes(round=1) if row.status != "accepted"]
    assert (row.node, row.status) == (1, "rejected")
    assert "max_update_norm = 1" in str(row.reason)
    assert engine.state.current.tensors["b"].tolist() == [0.25]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_rejected_by_name(value: float, tmp_path: Path) -> None:
    """Of a setup's statistics no codec looks at the values: the gate is all there is."""
    config = scripted(rounds=1, clients=3)

    def script(node: int, asked: Instruction) -> Reply:
        statistics = constant(0.25)
        if node == 1:
            statistics["a"][1] = value
        return Reply(asked.round, asked.index, EXAMPLES, payload=pack(statistics))

    engine = play(config, tmp_path / "run", script, method=Mean(config, kind="setup"))
    (row,) = [row for row in Run(tmp_path / "run").nodes(round=1) if row.status != "accepted"]
    assert (row.node, row.reason) == (1, "tensor a holds NaN or infinity")
    assert engine.state.current.tensors["a"].tolist() == [0.25, 0.25]


def test_nobody_counts_for_more_than_three_usual_clients(tmp_path: Path) -> None:
    """Two clients with 10 texts, one with 1000: it counts for 30, and the mean is 30 / 50 of its update."""
    config = scripted(rounds=1, clients=3).placed(deployed=True)
    texts = {0: 10, 1: 10, 2: 1000}

    def script(node: int, asked: Instruction) -> Reply:
        return send(config, node, asked, constant(5.0 * (node == 2)), examples=texts[node])

    engine = play(config, tmp_path / "run", script, texts=texts)
    assert engine.state.current.tensors["a"].tolist() == [3.0, 3.0]


def test_an_update_ten_times_as_long_as_usual_is_rejected(tmp_path: Path) -> None:
    """What is usual is the median of the rounds before: sqrt(3) times 1, whatever one client sends."""
    config = scripted(rounds=3, clients=3, server={"norm_ratio": 10.0, "quorum": 1})
    values = {1: (0.001, 1.0, 1.0), 2: (1.0, 9.9, 10.1), 3: (1.0, 1.0, 10.1)}

    def script(node: int, asked: Instruction) -> Reply:
        return send(config, node, asked, constant(values[asked.round][node]))

    method = Mean(config)
    method.stride = lambda tensors: 1.0  # type: ignore[method-assign]
    play(config, tmp_path / "run", script, method=method)
    rows = {
        (row.round, row.node): row.status for row in Run(tmp_path / "run").nodes() if row.exchange == "fit"
    }
    assert {at for at, status in rows.items() if status == "rejected"} == {(2, 2), (3, 2)}
    (reason,) = {row.reason for row in Run(tmp_path / "run").nodes() if row.status == "rejected"}
    assert reason == (
        "update norm 17.49 exceeds server.norm_ratio = 10 times the usual 1.732; "  # sqrt(3) * 10.1
        "raise it if honest updates are longer, or set it to 0"
    )


class Apart(Mean):
    """The mean of what all send but client 2, whose three numbers are something else."""

    def expected(self, exchange: Exchange, view: Tensors, node: int) -> Spec:
        return {"numbers": TensorSpec((3,))} if node == 2 else self.spec(exchange, view)

    def gated(self, node: int) -> bool:
        return node != 2

    def fold(self, acc: MeanAccumulator, kind: str, reply: Counted) -> MeanAccumulator:
        return acc if reply.node == 2 else super().fold(acc, kind, reply)


def test_an_answer_of_another_kind_has_a_shape_of_its_own_and_no_length(tmp_path: Path) -> None:
    """However long it is, it passes, and nobody learns from it how long updates are."""
    config = scripted(rounds=2, clients=4, server={"norm_ratio": 10.0, "max_update_norm": 50.0})

    def script(node: int, asked: Instruction) -> Reply:
        other = {"numbers": torch.full((3,), 1e6)}
        return send(config, node, asked, other if node >= 2 else constant(1.0))

    method = Apart(config)
    method.stride = lambda tensors: 1.0  # type: ignore[method-assign]
    engine = play(config, tmp_path / "run", script, method=method)
    rows = [row for row in Run(tmp_path / "run").nodes() if row.exchange == "fit"]
    found = {(row.round, row.node): (row.status, row.update_norm) for row in rows}
    assert found[1, 2] == found[2, 2] == ("accepted", None)
    assert found[1, 0] == ("accepted", pytest.approx(math.sqrt(3)))
    assert found[1, 3][0] == found[2, 3][0] == "rejected"  # read as an update, it is far too long
    assert engine.state.usual.norm == pytest.approx(math.sqrt(3))
    assert engine.state.current.tensors["a"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("ratio", [1.0, 1.001])
def test_a_norm_of_just_the_bound_passes(ratio: float, tmp_path: Path) -> None:
    """sqrt(1 + 1 + 0.25) = 1.5."""
    config = scripted(rounds=1, clients=3, server={"max_update_norm": 1.5})

    def script(node: int, asked: Instruction) -> Reply:
        update = {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([0.5])}
        return send(config, node, asked, {n: t * (ratio if node == 1 else 0.5) for n, t in update.items()})

    play(config, tmp_path / "run", script)
    rows = {row.node: row for row in Run(tmp_path / "run").nodes(round=1)}
    assert rows[1].status == ("accepted" if ratio == 1.0 else "rejected")
    assert rows[0].update_norm == pytest.approx(0.75)  # as the server measures it


def test_what_became_of_each_reply_is_in_the_record(tmp_path: Path) -> None:
    config = scripted(rounds=1, clients=4, server={"quorum": 1, "deadline_s": 0.2})
    metrics = {"loss": 0.5, "seconds": 2.0, "forward": 3.0, "backward": 1.5, "peak_rss_bytes": 4096.0}

    def script(node: int, asked: Instruction) -> Reply | str | None:
        if node == 1:
            return Reply(asked.round, asked.index, error="out of memory")
        if node > 1:
            return "killed" if node == 2 else None
        return send(config, node, asked, constant(1.0), metrics={**metrics, "own": 7.0})

    play(config, tmp_path / "run", script)
    rows = {row.node: row for row in Run(tmp_path / "run").nodes(round=1)}
    told = {node: (row.status, row.reason, row.exchange, row.attempt) for node, row in rows.items()}
    assert told == {
        0: ("accepted", None, "fit", 0),
        1: ("failed", "out of memory", "fit", 0),
        2: ("failed", "the client failed: killed", "fit", 0),
        3: ("late", "no reply before the deadline", "fit", 0),
    }
    row = rows[0]
    assert (row.examples, row.loss, row.compute_seconds) == (EXAMPLES, 0.5, 2.0)
    assert (row.transfer_seconds, row.peak_rss_bytes, row.metrics) == (0.0, 4096, {"own": 7.0})
    record = Run(tmp_path / "run").rounds()[-1]
    assert (record.forward, record.backward, record.client_compute) == (3.0, 1.5, 2.0)
    assert (record.participants, record.failures, record.rejected) == (1, 3, 0)


def test_followers_are_told_what_is_waited_for(tmp_path: Path) -> None:
    config = scripted(rounds=1, clients=2, server={"deadline_s": 7.0})
    told = []

    def script(node: int, asked: Instruction) -> Reply:
        told.append(Run(tmp_path / "run").phase)
        return send(config, node, asked, constant(1.0))

    began = time.time()
    play(config, tmp_path / "run", script)
    phase = told[0]
    assert (phase["name"], phase["have"], phase["need"]) == ("fit", 0, 2)
    assert (phase["round"], phase["rounds"]) == (1, 1)
    assert began + 7.0 <= phase["closes_at"] <= time.time() + 7.0


def test_the_number_of_a_node_that_is_online_is_not_given_away(tmp_path: Path) -> None:
    """Node 7 says that it is client 0, as node 5 did: whoever came first stays."""
    config = scripted(rounds=1, clients=2)

    def script(node: int, asked: Instruction) -> Reply:
        return send(config, node, asked, constant(1.0))

    grid = grid_of(config, script, {5: 0, 6: 1, 7: 0})
    with loopback(2, {}), RunStore.create(tmp_path / "run", config) as store:
        engine_of(config, store).start(grid)
    assert [flower_id for flower_id, kind in grid.asked if kind == "fit"] == [5, 6]
    (refused,) = [event for event in Run(tmp_path / "run").events() if event.kind == "refused"]
    assert "client number 0 is already taken" in refused.message
    assert refused.fields["flower_id"] == "7"


def test_a_number_is_the_one_that_the_key_stands_for(tmp_path: Path) -> None:
    """Node 6 says that it is client 1 and its key that it is 2; nobody knows the key of node 8."""
    config = scripted(rounds=1, clients=3, server={"deadline_s": 0.5})

    def script(node: int, asked: Instruction) -> Reply:
        return send(config, node, asked, constant(1.0))

    grid = grid_of(config, script, {5: 0, 6: 1, 7: 1, 8: 2})
    with loopback(3, {}), RunStore.create(tmp_path / "run", config) as store:
        engine_of(config, store, proven=lambda: {5: 0, 6: 2, 7: 1}).start(grid)
    assert [flower_id for flower_id, kind in grid.asked if kind == "fit"] == [5, 7]
    refused = {
        e.fields["flower_id"]: e.message for e in Run(tmp_path / "run").events() if e.kind == "refused"
    }
    assert set(refused) == {"6", "8"}
    assert "its key is that of node 2, and it says that it is client 1" in refused["6"]
    assert "its key is none that may join" in refused["8"]


def test_a_number_is_given_to_a_client_that_came_back() -> None:
    roster = Roster(4)
    assert roster.admit(Member(0, 5, 10), [5]) == ""
    assert "number 0 is already taken" in roster.admit(Member(0, 7, 10), [5, 7])
    assert roster.members[0].flower_id == 5
    assert roster.admit(Member(0, 5, 12), [5, 7]) == ""  # the same node again
    assert roster.admit(Member(0, 7, 10), [7]) == ""  # node 5 has gone
    assert roster.members[0].flower_id == 7


# --- what the operator asks for -------------------------------------------------------------------------


def test_a_quarantined_node_stays_so_when_the_run_is_resumed(
    tmp_path: Path, leaping_clock: LeapingClock
) -> None:
    config = scripted(rounds=4, server={"quorum": 1, "deadline_s": 60.0})
    asked_in: list[tuple[int, int]] = []
    folder = tmp_path / "run"

    def script(node: int, asked: Instruction) -> Reply:
        if not any(round == asked.round for round, _ in asked_in):
            if asked.round == 1:
                Run(folder).post_command("quarantine", by="operator", node=2)
            if asked.round == 2:
                Run(folder).post_command("stop", by="operator")
        asked_in.append((asked.round, node))
        return send(config, node, asked, constant(1.0))

    assert play(config, folder, script).completed == 2
    before = leaping_clock.paused
    with loopback(4, {}), RunStore.open(folder) as store:
        saved = checkpoint.latest(folder / "checkpoints")
        assert saved is not None
        engine = engine_of(config, store, start=ServerState.load(saved))
        engine.start(grid_of(config, script))
    assert leaping_clock.paused == before  # nobody waits for a node that is set aside
    by_round = {
        round: [node for _, node in rows] for round, rows in itertools.groupby(asked_in, lambda row: row[0])
    }
    assert by_round == {1: [0, 1, 2, 3], 2: [0, 1, 3], 3: [0, 1, 3], 4: [0, 1, 3]}


@pytest.mark.parametrize("before", [[], ["pause"], ["pause", "resume"]])
def test_stop_is_obeyed_whether_paused_or_not(before: list[str], tmp_path: Path) -> None:
    config = scripted(rounds=3)
    folder = tmp_path / "run"

    def script(node: int, asked: Instruction) -> Reply:
        if node == 0 and asked.round == 1:
            for kind in [*before, "stop"]:
                Run(folder).post_command(kind, by="operator")
        return send(config, node, asked, constant(1.0))

    engine = play(config, folder, script)
    assert (engine.completed, engine.finished) == (1, False)


def test_a_paused_run_waits_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = scripted(rounds=2)
    folder = tmp_path / "run"
    waits = 0

    def wait(_: float) -> None:
        nonlocal waits
        waits += 1
        assert Run(folder).phase["name"] == "paused"
        assert Run(folder).rounds()[-1].round == 1
        if waits == 3:
            Run(folder).post_command("resume", by="operator")

    def script(node: int, asked: Instruction) -> Reply:
        if (node, asked.round) == (0, 1):
            Run(folder).post_command("pause", by="operator")
        return send(config, node, asked, constant(1.0))

    monkeypatch.setattr("server.rounds.engine.time.sleep", wait)
    assert play(config, folder, script).finished
    assert waits == 3


def test_a_released_node_is_asked_again(tmp_path: Path) -> None:
    config = scripted(rounds=3, clients=2, server={"quorum": 1})
    folder = tmp_path / "run"
    asked_in: list[tuple[int, int]] = []

    def script(node: int, asked: Instruction) -> Reply:
        asked_in.append((asked.round, node))
        if node == 0 and asked.round < 3:
            kind = ("quarantine", "release")[asked.round - 1]
            Run(folder).post_command(kind, by="operator", node=1)
        return send(config, node, asked, constant(1.0))

    play(config, folder, script)
    assert asked_in == [(1, 0), (1, 1), (2, 0), (3, 0), (3, 1)]
