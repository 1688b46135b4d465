"""Asynchronous rounds by pen and paper: whose answer counts when, and for how much; and their bits again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, RunFailed
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from simulations.engines.loopback import loopback
from simulations.engines.loopback import simulate as in_process
from strategies.registry import resolve_run
from tests.rounds.clock.test_clock import clock_of, device, simulated
from tests.rounds.clock.test_same_time import outcome
from tests.rounds.federation import configuration, cut, run
from tests.rounds.scripted import constant, engine_of, grid_of, play, scripted, send

SENT, TEXTS = (1.0, 10.0, 100.0), (10, 20, 30)
"""What each client's updates hold, and how many texts stand behind it."""


def buffered(clients: int, rounds: int, **server: Any) -> RunConfig:
    server = {"mode": "async", "deadline_s": 100.0, **server}
    return scripted(clients=clients, rounds=rounds, server=server)


def passes(config: RunConfig, *counts: float) -> Callable[[int, Instruction], Reply]:
    """Let client k make so many passes, which take a second each, beside a second of latency."""

    def script(node: int, asked: Instruction) -> Reply:
        told = {"metrics": {"forward": counts[node]}, "examples": TEXTS[node]}
        return send(config, node, asked, constant(SENT[node]), **told)

    return script


def line(folder: Path, round: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "rounds.jsonl").read_text().splitlines()[round])
    return found


def test_the_fast_client_counts_often_and_the_slow_one_for_less(tmp_path: Path) -> None:
    """Each answer is a commit. The slow one takes 10.5 s, in which the fast one answers five times."""
    config = buffered(2, 7, concurrency=2, buffer=1)
    script = passes(config, 1.0, 9.5)
    engine = play(config, tmp_path / "run", script, clock=clock_of(*[device()] * 2))
    told = Run(tmp_path / "run")
    assert [record.details["accepted"] for record in told.rounds()[1:]] == [[0]] * 5 + [[1]] + [[0]]
    stale = [record.details["staleness_max"] for record in told.rounds()[1:]]
    assert stale == [0, 0, 0, 0, 0, 5, 1]
    assert float(engine.state.current.tensors["b"]) == pytest.approx(5 + 10 * 6**-0.5 + 2**-0.5)
    seconds = [simulated(told, number) for number in range(1, 8)]
    assert seconds == pytest.approx([2, 2, 2, 2, 2, 0.5, 1.5], abs=0.05)
    assert told.summary["seconds"]["simulated"] == pytest.approx(12.0, abs=0.1)
    # Client 1 is at work on its second answer, which the run's end leaves behind.
    rows = told.traffic(("node", "direction", "exchange"))
    counted = {(row["node"], row["direction"]): row["bytes"] for row in rows if row["exchange"] == "fit"}
    assert set(engine.state.flights) == {1}
    assert counted[1, "down"] > counted[1, "up"] > 0


@pytest.mark.parametrize(
    ("server", "weight"),
    [({}, 2**-0.5), ({"staleness_exponent": 2.0}, 0.25), ({"staleness": "constant"}, 1.0)],
)
def test_a_buffer_weighs_texts_times_staleness(server: dict[str, Any], weight: float, tmp_path: Path) -> None:
    """Rounds end with the answers of clients 0 and 1, 0 and 2 (begun a round ago), 0 and 1 (a round ago)."""
    config = buffered(3, 3, buffer=2, learning_rate=0.5, **server)
    engine = play(config, tmp_path / "run", passes(config, 1.0, 5.5, 9.0), clock=clock_of(*[device()] * 3))
    told = Run(tmp_path / "run")
    assert [record.details["accepted"] for record in told.rounds()[1:]] == [[0, 1], [0, 2], [0, 1]]
    first = (10 * 1 + 20 * 10) / 30
    second = (10 * 1 + 30 * 100 * weight) / 40
    third = (10 * 1 + 20 * 10 * weight) / 30
    assert float(engine.state.current.tensors["b"]) == pytest.approx(0.5 * (first + second + third))
    assert [simulated(told, number) for number in (1, 2, 3)] == pytest.approx([6.5, 3.5, 3.0], abs=0.05)
    assert "staleness_mean" not in line(tmp_path / "run", 0)
    assert [line(tmp_path / "run", number)["staleness_mean"] for number in (1, 2, 3)] == [0, 0.5, 0.5]
    assert line(tmp_path / "run", 2)["staleness_max"] == 1


def test_what_is_too_stale_is_passed_over_and_its_client_asked_anew(tmp_path: Path) -> None:
    config = buffered(2, 8, buffer=1, max_staleness=4)
    engine = play(config, tmp_path / "run", passes(config, 1.0, 9.5), clock=clock_of(*[device()] * 2))
    told = Run(tmp_path / "run")
    (row,) = (row for row in told.nodes() if row.status == "late")
    assert (row.node, row.round, row.reason) == (1, 6, "it began 5 commits ago, server.max_staleness = 4")
    assert float(engine.state.current.tensors["b"]) == pytest.approx(8.0)
    assert engine.state.flights[1].begun == (6, 5)


def real(encoder: Path, texts: Path, **sections: Any) -> RunConfig:
    """Six devices of two speeds, which come and go; residuals on both sides."""
    fast = {
        "gflops": 1e-1, "efficiency": 0.5, "memory_gb": 1, "down_mbps": 1, "up_mbps": 1,
        "availability": 0.9, "session_s": 3.0,
    }  # fmt: skip
    slow = {**fast, "gflops": 5e-3}
    plain = {
        "codec": {"up": "error_feedback(quantize(bits=2))", "down": "error_feedback(quantize(bits=8))"},
        "simulation": {"profile": {"fast": 4, "slow": 2}, "devices": {"fast": fast, "slow": slow}},
    }
    return configuration(encoder, texts, **{**plain, **sections})


@pytest.fixture
def config(tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    server = {"mode": "async", "concurrency": 4, "buffer": 2, "retries": 20, "optimizer": "momentum"}
    return real(tiny_encoder, tiny_texts, rounds=6, server=server)


@pytest.mark.slow
def test_a_buffer_of_all_clients_is_a_synchronous_round(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Bit for bit, though nobody waits for a cohort: nobody is asked who has answered already."""
    found = []
    for mode in ({"mode": "async", "buffer": 6}, {"quorum": 6}):
        config = real(
            tiny_encoder,
            tiny_texts,
            rounds=3,
            simulation={"profile": "phones-4g"},
            server={"optimizer": "adam", **mode},
        )
        found.append(run(config, tmp_path / config.server.mode))
    assert found[0]["state_sha256"] == found[1]["state_sha256"]
    assert found[0]["bytes"] == found[1]["bytes"]
    assert found[0]["seconds"]["simulated"] == pytest.approx(found[1]["seconds"]["simulated"])


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(config: RunConfig, tmp_path: Path) -> None:
    """Also with answers that came after the kill and were begun before it."""
    run(config, tmp_path / "whole")
    cut(config, tmp_path / "cut", 4)
    run(config, tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert max(row.metrics.get("staleness", 0) for row in Run(tmp_path / "cut").nodes(round=4)) > 0
    rows = Run(tmp_path / "cut").nodes()
    assert {"accepted", "failed"} <= {row.status for row in rows}
    assert not any("state_lost" in row.metrics for row in rows)


@pytest.mark.slow
def test_a_pool_of_workers_counts_in_the_same_order(config: RunConfig, tmp_path: Path) -> None:
    in_process(config, tmp_path / "alone")
    in_process(config, tmp_path / "pool", workers=2)
    assert outcome(tmp_path / "pool") == outcome(tmp_path / "alone")


@pytest.mark.parametrize("buffer", [2, 3])
def test_on_a_network_answers_count_as_they_come(buffer: int, tmp_path: Path) -> None:
    """Client 2 never answers: the others make rounds of two without it, and none of three."""
    config = buffered(3, 4, buffer=buffer, deadline_s=7.0)

    def script(node: int, asked: Instruction) -> Reply | None:
        return None if node == 2 else send(config, node, asked, constant(SENT[node]))

    with loopback(3, {}), RunStore.create(tmp_path / "run", config) as store:
        engine = engine_of(config, store, networked=True)
        missed = "round 1 missed its quorum of 3 in 1 attempts: no reply before the deadline"
        with pytest.raises(RunFailed, match=missed) if buffer == 3 else nullcontext():
            engine.start(grid_of(config, script))
    rounds = Run(tmp_path / "run").rounds()[1:]
    if buffer == 2:
        assert [record.details["accepted"] for record in rounds] == [[0, 1]] * 4
        assert float(engine.state.current.tensors["b"]) == pytest.approx(4 * 5.5)
        assert set(engine.state.flights) == {2}


SGD = {"optimizer": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}


def refused(**keys: Any) -> str:
    server = {"mode": "async", **keys.pop("server", {})}
    with pytest.raises(ConfigError) as raised:
        resolve_run({"simulation": {"profile": "phones-4g"}, "server": server, **keys}).placed(deployed=False)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"method": "fwdllm"},
            'which method = "fwdllm" cannot: take method "fedavg", or "lora" with rule fedit',
        ),
        ({"method": "fedkd"}, 'which method = "fedkd" cannot'),
        ({"method": "scaffold", "training": SGD}, 'which method = "scaffold" cannot'),
        ({"lora": {"rule": "stack"}}, 'which method = "lora" with lora.rule = "stack" cannot'),
        ({"lora": {"rule": "alternate"}}, 'which method = "lora" with lora.rule = "alternate" cannot'),
        ({"simulation": {}}, 'set simulation.profile, such as "phones-4g"'),
        ({"server": {"quorum": 2}}, 'server.quorum is for server.mode = "sync"'),
        ({"server": {"sample": 5, "over_select": 2}}, 'server.over_select is for server.mode = "sync"'),
        (
            {"server": {"sample": 2, "concurrency": 3}},
            "server.sample = 2 and server.concurrency = 3 both say",
        ),
        ({"server": {"buffer": 11}}, "server.buffer = 11 waits for as many different clients"),
        ({"server": {"concurrency": 11}}, "server.concurrency = 11 asks for more clients than clients = 10"),
        ({"server": {"mode": "sync", "buffer": 3}}, 'server.buffer is for server.mode = "async"'),
    ],
)
def test_what_cannot_be_asynchronous_is_refused_in_a_sentence(keys: dict[str, Any], said: str) -> None:
    assert said in refused(**keys)
