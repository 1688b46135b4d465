"""Simulated time by hand: seconds of a device, who is late, who has left, and how long a round takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.devices import Device, Named
from fedllm.errors import RunFailed
from fedllm.protocol.wire import STALE, Instruction, Reply
from fedllm.randomness import stream
from fedllm.runs.reader import Run
from fedllm.runs.records import NodeRound
from server.rounds.exchange import conversation
from server.rounds.timing import clock as clocks
from server.rounds.timing.clock import Clock
from tests.rounds.scripted import Mean, constant, play, scripted, send

DEADLINE_S = 100.0
FLOPS_A_PASS = 2e9
"""What a pass costs in these tests: on :func:`device` one second."""


def device(**changes: Any) -> Device:
    """2 GFLOP/s after losses; a byte takes 8 microseconds down and 16 up, a message half a second more."""
    plain = {"gflops": 4.0, "efficiency": 0.5, "memory_gb": 1.0, "down_mbps": 1.0, "up_mbps": 0.5}
    return Device.model_validate({**plain, "latency_s": 0.5, **changes})


def clock_of(*devices: Device, deadline_s: float = DEADLINE_S, seed: int = 0) -> Clock:
    named = [Named(f"device-{number}", one) for number, one in enumerate(devices)]
    return Clock(
        named, lambda node, kind, reply: FLOPS_A_PASS * reply.metrics.get("forward", 0), seed, deadline_s
    )


def passes(*counts: float) -> Callable[[int, Instruction], Reply]:
    """Let client k make so many passes, which take it as many seconds."""

    def script(node: int, asked: Instruction) -> Reply:
        metrics = {"forward": counts[node]}
        return send(scripted(), node, asked, constant(node + 1.0), metrics=metrics)

    return script


def outcomes(run: Run, round: int = 1, exchange: str = "fit") -> dict[int, str]:
    return {row.node: row.status for row in run.nodes(round=round) if row.exchange == exchange}


def simulated(run: Run, round: int = 1) -> float:
    return float(run.rounds()[round].details["seconds_simulated"])


def moved(run: Run, node: int, direction: str, round: int = 1) -> int:
    """Bytes of the round's exchange by the ledger, introductions left out."""
    rows = run.traffic(("round", "node", "direction", "exchange"))
    key = (round, node, direction, "fit")
    return sum(
        row["bytes"] for row in rows if (row["round"], row["node"], row["direction"], row["exchange"]) == key
    )


def test_the_seconds_of_a_device_are_those_of_pen_and_paper(tmp_path: Path) -> None:
    """One client, three passes: 3 s of computing, 1 s of latency, and the bytes of the ledger."""
    config = scripted(clients=1, rounds=1, server={"quorum": 1})
    play(config, tmp_path / "run", passes(3.0), clock=clock_of(device()))
    run = Run(tmp_path / "run")
    seconds = 3.0 + 1.0 + moved(run, 0, "down") * 8e-6 + moved(run, 0, "up") * 16e-6
    assert simulated(run) == pytest.approx(seconds, rel=1e-12)
    (row,) = (row for row in run.nodes(round=1) if row.exchange == "fit")
    assert row.metrics["seconds_simulated"] == pytest.approx(seconds, rel=1e-12)
    assert run.summary["seconds"]["simulated"] == pytest.approx(simulated(run, 0) + seconds, rel=1e-12)
    assert simulated(run, 0) == 0.0


def test_a_round_takes_as_long_as_its_slowest_client(tmp_path: Path) -> None:
    play(scripted(rounds=1), tmp_path / "run", passes(1, 7, 3, 2), clock=clock_of(*[device()] * 4))
    assert 8.0 < simulated(Run(tmp_path / "run")) < 8.1


def test_who_misses_the_deadline_is_late_and_the_round_ends_with_it(tmp_path: Path) -> None:
    config = scripted(rounds=1, server={"quorum": 2, "deadline_s": 50.0})
    play(config, tmp_path / "run", passes(1, 60, 3, 2), clock=clock_of(*[device()] * 4, deadline_s=50.0))
    run = Run(tmp_path / "run")
    assert outcomes(run) == {0: "accepted", 1: "late", 2: "accepted", 3: "accepted"}
    assert simulated(run) == 50.0
    assert reason(run, 1) == "a device-1 answers after 1 min 1 s of simulated time, server.deadline_s = 50"
    # Clients 0, 2 and 3 sent 1, 3 and 4.
    assert float(last(run)) == pytest.approx(8.0 / 3.0)


def test_of_over_selected_clients_the_first_count(tmp_path: Path) -> None:
    config = scripted(rounds=1, server={"sample": 2, "over_select": 2})
    play(config, tmp_path / "run", passes(9, 4, 1, 8), clock=clock_of(*[device()] * 4))
    run = Run(tmp_path / "run")
    assert outcomes(run) == {0: "unused", 1: "accepted", 2: "accepted", 3: "unused"}
    assert 5.0 < simulated(run) < 5.1
    assert float(last(run)) == pytest.approx(2.5)


def test_of_equal_times_the_lower_number_comes_first(tmp_path: Path) -> None:
    config = scripted(rounds=1, server={"sample": 2, "over_select": 2})
    play(config, tmp_path / "run", passes(5, 5, 5, 5), clock=clock_of(*[device()] * 4))
    found = outcomes(Run(tmp_path / "run"))
    assert found == {0: "accepted", 1: "accepted", 2: "unused", 3: "unused"}


def test_a_device_that_leaves_before_it_has_answered_failed(tmp_path: Path) -> None:
    """Its session of 10 s is over after a share of them that its own stream draws."""
    staying, leaving = device(), device(session_s=10.0)
    play(
        scripted(rounds=1),
        tmp_path / "run",
        passes(1, 20, 2, 3),
        clock=clock_of(staying, leaving, staying, staying),
    )
    run = Run(tmp_path / "run")
    draws = stream(0, "device", 1, 1, 0, 0)
    draws.random()  # whether it is there
    left = 10.0 * draws.random()
    assert outcomes(run) == {0: "accepted", 1: "failed", 2: "accepted", 3: "accepted"}
    assert reason(run, 1) == f"the device left after {left:.2f} s of simulated time"
    assert simulated(run) == pytest.approx(max(left, 4.0), abs=0.1)


def test_a_client_asked_again_answers_what_it_has(tmp_path: Path) -> None:
    """Two of four miss 10 s; at the second attempt, 10 s later, client 2 is done and client 3 is nearly."""
    config = scripted(rounds=1, server={"quorum": 4, "retries": 1, "deadline_s": 10.0})
    play(config, tmp_path / "run", passes(1, 2, 11, 18), clock=clock_of(*[device()] * 4, deadline_s=10.0))
    run = Run(tmp_path / "run")
    second = {row.node: row for row in run.nodes(round=1) if row.attempt == 1}
    assert {row.status for row in second.values()} == {"accepted"}
    taken = {node: row.metrics["seconds_simulated"] for node, row in second.items()}
    assert taken == pytest.approx({0: 1.0, 1: 1.0, 2: 2.0, 3: 9.0}, abs=0.05)
    assert simulated(run) == pytest.approx(19.0, abs=0.05)


def test_exchanges_of_a_round_follow_each_other(tmp_path: Path) -> None:
    config = scripted(rounds=1)
    method = Mean(config, exchanges=3)
    play(config, tmp_path / "run", passes(1, 2, 3, 4), method=method, clock=clock_of(*[device()] * 4))
    assert simulated(Run(tmp_path / "run")) == pytest.approx(15.0, abs=0.1)


def test_evaluation_on_clients_takes_its_time(tmp_path: Path) -> None:
    config = scripted(rounds=1, evaluation={"clients": True}, data={"client_test_fraction": 0.5})

    def script(node: int, asked: Instruction) -> Reply:
        if asked.kind == "evaluate":
            return Reply(asked.round, asked.index, 10, {"accuracy": 0.5, "forward": 7.0})
        return send(config, node, asked, constant(1.0))

    play(config, tmp_path / "run", script, clock=clock_of(*[device()] * 4))
    assert simulated(Run(tmp_path / "run")) == pytest.approx(1.0 + 8.0, abs=0.1)


def test_a_round_waits_until_a_quorum_of_devices_is_there() -> None:
    """Who is there after how many looks follows from each device's own stream."""
    rare = [device(availability=0.2)] * 4
    clock = clock_of(*rare, seed=3)
    there = clock.begin(5, 0, range(4), 2)
    looks = round(clock.now / clocks.WAIT_S)

    def naive(look: int) -> list[int]:
        return [node for node in range(4) if stream(3, "device", node, 5, 0, look).random() < 0.2]

    assert there == naive(looks)
    assert all(len(naive(look)) < 2 for look in range(looks))
    assert looks > 0
    assert len(there) >= 2


def test_devices_that_are_never_there_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_LOOKS", 3)
    with pytest.raises(
        RunFailed, match=r"^round 1: a quorum of 2 devices was not there once in 3 min of simul"
    ):
        clock_of(*[device(availability=1e-9)] * 2).begin(1, 0, range(2), 2)


def test_a_short_simulated_deadline_is_none_for_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    real = clocks.Timed.close

    def note(timed: clocks.Timed) -> dict[int, str]:
        waited.append(timed.held)
        return real(timed)

    monkeypatch.setattr(clocks.Timed, "close", note)
    config = scripted(rounds=1, server={"quorum": 1, "deadline_s": 1e-6, "retries": 0})
    with pytest.raises(
        RunFailed, match=r"round 1 missed its quorum of 1 in 1 attempts: a device-3 answers after"
    ):
        play(config, tmp_path / "run", passes(1, 1, 1, 1), clock=clock_of(*[device()] * 4, deadline_s=1e-6))
    assert waited == [4]


def reason(run: Run, node: int) -> str | None:
    rows: list[NodeRound] = [row for row in run.nodes(round=1) if row.node == node]
    return rows[-1].reason


def last(run: Run) -> Any:
    """Value of the global tensors, which began as zeros, after the last round."""
    from fedllm.runs import checkpoint

    saved = checkpoint.latest(run.folder / "checkpoints")
    assert saved is not None
    return saved.groups["tensors"]["b"][0]


def test_every_round_has_a_clock_of_its_own(tmp_path: Path) -> None:
    def script(node: int, asked: Instruction) -> Reply:
        return passes(*[asked.round] * 4)(node, asked)

    play(scripted(rounds=3), tmp_path / "run", script, clock=clock_of(*[device()] * 4))
    seconds = [record.details["seconds_simulated"] for record in Run(tmp_path / "run").rounds()]
    assert seconds == pytest.approx([0.0, 2.0, 3.0, 4.0], abs=0.05)


def test_what_a_process_forgot_is_sent_again_in_no_time(tmp_path: Path) -> None:
    """On a device the tensors would still lie there: only the first question and the last answer count."""
    config, forgetful = scripted(clients=1, rounds=1, server={"quorum": 1}), [True]

    def script(node: int, asked: Instruction) -> Reply:
        if forgetful.pop():
            forgetful.append(False)
            return Reply(asked.round, asked.index, error=STALE)
        return passes(3.0)(node, asked)

    engine = play(config, tmp_path / "run", script, clock=clock_of(device()))
    run = Run(tmp_path / "run")
    assert engine.completed == 1
    assert outcomes(run) == {0: "accepted"}
    twice = 3.0 + 1.0 + moved(run, 0, "down") * 8e-6 + moved(run, 0, "up") * 16e-6
    assert 4.0 < simulated(run) < twice


def test_a_client_that_the_host_never_hears_of_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits ten minutes for it, though the devices' deadline is 20 s; the round takes those."""
    now = [0.0]
    monkeypatch.setattr(conversation.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(conversation.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    config = scripted(rounds=1, server={"quorum": 1, "deadline_s": 20.0})

    def script(node: int, asked: Instruction) -> Reply | None:
        return None if node == 2 else passes(1, 2, 3, 4)(node, asked)

    engine = play(config, tmp_path / "run", script, clock=clock_of(*[device()] * 4, deadline_s=20.0))
    run = Run(tmp_path / "run")
    assert outcomes(run) == {0: "accepted", 1: "accepted", 2: "late", 3: "accepted"}
    assert simulated(run) == 20.0
    assert 600.0 < now[0] < 602.0
    (told,) = [event.message for event in run.events() if event.kind == "warning"]
    assert told.startswith("round 1 closed without 1 of its clients, as none answered for 600 seconds:")
    assert engine._admission._deadline_s == 600.0


def test_what_a_device_makes_once_it_makes_with_its_first_answer_that_counts(tmp_path: Path) -> None:
    """Five passes, of which three make what is kept; client 1 is late in round 1, and makes them again."""
    config = scripted(rounds=2, clients=2, server={"quorum": 1, "deadline_s": 20.0})

    def script(node: int, asked: Instruction) -> Reply:
        slow = 30.0 if (node, asked.round) == (1, 1) else 0.0
        metrics = {"forward": 5.0 + slow, "forward_once": 3.0}
        return send(config, node, asked, constant(1.0), metrics=metrics)

    play(config, tmp_path / "run", script, clock=clock_of(*[device()] * 2, deadline_s=20.0))
    run = Run(tmp_path / "run")
    taken = {row.node: row.metrics["seconds_simulated"] for row in run.nodes(round=2)}
    assert taken == pytest.approx({0: 3.0, 1: 6.0}, abs=0.05)
    assert run.summary["passes"]["forward"] == 5.0 + 2.0 + 5.0
    assert "forward_once" not in run.nodes(round=2)[0].metrics
