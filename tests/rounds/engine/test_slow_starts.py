"""A node that is online and loads its model is waited for; absent is only who is not there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedllm.errors import RunFailed
from fedllm.protocol import wire
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.reader import Run
from fedllm.runs.totals import node_totals
from fedllm.runs.writer import RunStore
from server.dashboard.reading.verdict import UNUSABLE
from server.rounds import admission
from server.rounds.engine import Engine
from server.rounds.exchange import conversation as exchange
from simulations.engines.loopback import loopback
from tests.rounds.scripted import ScriptedGrid, constant, engine_of, scripted, send

NUMBERS = {100 + node: node for node in range(4)}
STEP_S = 5.0
"""The clock moves so far with every look at who is online."""


class Starting(ScriptedGrid):
    """Nodes that are online at ``comes`` and can answer a question of ``describe`` when ``ready`` says so."""

    clock: list[float]
    comes: Callable[[int, float], bool]
    ready: Callable[[int, float, int], bool]
    questions: dict[int, int]
    """How often each node was asked to introduce itself."""

    def get_node_ids(self) -> Iterable[int]:
        self.clock[0] += STEP_S
        return [flower for flower, node in self.numbers.items() if self.comes(node, self.clock[0])]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            if wire.unpack_instruction(message.content).kind == "describe":
                node = self.numbers[message.metadata.dst_node_id]
                self.questions[node] = self.questions.get(node, 0) + 1
                message.metadata.__dict__["question"] = self.questions[node]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        held, due = list[Message](), deque[Message]()
        for message in self._queue:
            node, place = (
                self.numbers[message.metadata.dst_node_id],
                message.metadata.__dict__.get("question"),
            )
            loading = place is not None and not self.ready(node, self.clock[0], place)
            (held if loading else due).append(message)
        self._queue = due
        replies = super().pull_messages(message_ids)
        self._queue.extend(held)
        return replies


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed; no pause takes any."""
    now = [0.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(admission.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(exchange, "_LOOK_S", 0.0)
    return now


def answer(node: int, asked: Instruction) -> Reply | None:
    return send(scripted(), node, asked, constant(1.0))


def play(
    folder: Path,
    clock: list[float],
    *,
    comes: Callable[[int, float], bool] = lambda node, now: True,
    ready: Callable[[int, float, int], bool] = lambda node, now, question: True,
    proven: Callable[[], Mapping[int, int]] | None = lambda: NUMBERS,
    script: Callable[[int, Instruction], Reply | None] = answer,
    rounds: int = 2,
    numbers: Mapping[int, int] = NUMBERS,
    **server: Any,
) -> Engine:
    config = scripted(rounds=rounds, server={"quorum": 3, "deadline_s": 20.0, **server})
    with loopback(4, {}), RunStore.create(folder, config) as store:
        grid = Starting(4, {}, None)
        grid.numbers, grid.texts, grid.asked, grid.questions = numbers, {}, [], {}
        grid.script = script  # type: ignore[method-assign,assignment]
        grid.clock, grid.comes, grid.ready = clock, comes, ready  # type: ignore[method-assign,assignment]
        engine = engine_of(config, store, proven=proven)
        engine.start(grid)
    return engine


def accepted(folder: Path) -> list[list[int]]:
    return [record.details["accepted"] for record in Run(folder).rounds(after=0)]


def test_nodes_that_answer_after_twice_the_deadline_take_part(tmp_path: Path, clock: list[float]) -> None:
    """All are online from the start; each answers its first question, and none of the later ones."""

    def ready(node: int, now: float, question: int) -> bool:
        return question == 1 and now > 33 + 4 * node

    assert play(tmp_path / "run", clock, ready=ready).finished
    assert accepted(tmp_path / "run") == [[0, 1, 2, 3]] * 2
    assert {event.kind for event in Run(tmp_path / "run").events()}.isdisjoint({"left", "refused"})


def test_a_lost_question_is_asked_again(tmp_path: Path, clock: list[float]) -> None:
    assert play(tmp_path / "run", clock, ready=lambda node, now, question: question == 3).finished
    assert accepted(tmp_path / "run")[0] == [0, 1, 2, 3]


def test_what_a_node_does_meanwhile_is_told(tmp_path: Path, clock: list[float]) -> None:
    """Node 3 is not there; node 2 is, and loads: only one of them is absent."""
    folder, seen = tmp_path / "run", list[tuple[dict[str, Any], dict[int, str]]]()

    def ready(node: int, now: float, question: int) -> bool:
        if node == 2 and now > 15.0:
            seen.append((Run(folder).phase, {row.node: row.state for row in node_totals(folder)}))
        return node != 2 or now > 50.0

    assert play(folder, clock, comes=lambda node, now: node != 3, ready=ready).finished
    phase, states = seen[0]
    assert (phase["name"], phase["have"], phase["loading"]) == ("waiting for clients", 2, 1)
    assert phase["loading_nodes"] == [2]
    assert states[2] == "loading"
    assert "loading" not in UNUSABLE
    assert [row.state for row in node_totals(folder)][2] != "loading"


def test_who_is_away_is_waited_for_until_the_deadline_and_no_longer(
    tmp_path: Path, clock: list[float]
) -> None:
    with pytest.raises(RunFailed) as failed:
        play(tmp_path / "run", clock, comes=lambda node, now: node < 2)
    assert "2 of 4 clients came within server.deadline_s = 20 seconds, the quorum is 3" in str(failed.value)
    assert "; not online: node 2, node 3" in str(failed.value)
    assert clock[0] < 60.0


def test_who_is_online_and_never_answers_ends_the_waiting_at_last(tmp_path: Path, clock: list[float]) -> None:
    with pytest.raises(RunFailed) as failed:
        play(
            tmp_path / "run",
            clock,
            comes=lambda node, now: node != 3,
            ready=lambda node, now, question: node == 0,
        )
    assert "; not online: node 3; online, but silent for 60 minutes: node 1, node 2" in str(failed.value)
    assert 3600.0 < clock[0] < 3700.0


def test_setting_a_loading_node_aside_ends_the_waiting_for_it(tmp_path: Path, clock: list[float]) -> None:
    folder = tmp_path / "run"

    def comes(node: int, now: float) -> bool:
        if 100.0 < now <= 100.0 + STEP_S:
            Run(folder).post_command("quarantine", by="operator", node=3)
        return True

    assert play(folder, clock, ready=lambda node, now, question: node != 3, comes=comes).finished
    assert accepted(folder) == [[0, 1, 2]] * 2
    assert clock[0] < 300.0


def test_a_node_that_comes_later_and_stays_silent_costs_the_rounds_a_moment_once(
    tmp_path: Path, clock: list[float]
) -> None:
    """It comes in round 5 and is given a quarter of a deadline, 50 s; 15 rounds of that would be 750 s."""
    came = list[float]()

    def script(node: int, asked: Instruction) -> Reply | None:
        if asked.round == 5 and not came:
            came.append(clock[0])
        return answer(node, asked)

    play(
        tmp_path / "run",
        clock,
        comes=lambda node, now: node != 3 or bool(came),
        ready=lambda node, now, question: node != 3,
        script=script,
        rounds=20,
        deadline_s=200.0,
    )
    assert accepted(tmp_path / "run") == [[0, 1, 2]] * 20
    looks = 15 * 2 * STEP_S
    assert 50.0 <= clock[0] - came[0] - looks < 50.0 + 4 * STEP_S


def test_a_silent_node_that_cannot_be_a_client_is_not_waited_for(tmp_path: Path, clock: list[float]) -> None:
    """Its key is that of node 7, and the run has four clients; node 3 is not there."""
    numbers = {**NUMBERS, 107: 7}
    play(
        tmp_path / "run",
        clock,
        comes=lambda node, now: node != 3,
        ready=lambda node, now, question: node != 7,
        proven=lambda: numbers,
        numbers=numbers,
    )
    assert accepted(tmp_path / "run") == [[0, 1, 2]] * 2
    assert clock[0] < 100.0


def test_a_run_without_keys_waits_as_well(tmp_path: Path, clock: list[float]) -> None:
    assert play(
        tmp_path / "run", clock, ready=lambda node, now, question: now > 90.0 * (node == 2), proven=None
    ).finished
    assert accepted(tmp_path / "run") == [[0, 1, 2, 3]] * 2
