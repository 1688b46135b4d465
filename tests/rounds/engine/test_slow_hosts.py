"""How fast the host of a simulation is decides nothing: not who is late, and not who comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from flwr.app import Message

from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from server.rounds.exchange import conversation
from simulations.engines.loopback import loopback
from tests.rounds.scripted import Script, ScriptedGrid, constant, engine_of, scripted, send

SLOW_S, DEADLINE_S = 3.0, 5.0
NUMBERS = {100 + node: node for node in range(4)}


class SlowHost(ScriptedGrid):
    """Answers one question at a time, each in :data:`SLOW_S` seconds, in any order of those that are open."""

    clock: list[float]
    pick: Callable[[int], int]
    """Which of so many open questions is answered next."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if not self._queue:
            return []
        self._queue.rotate(-self.pick(len(self._queue)))
        held = [self._queue.pop() for _ in range(len(self._queue) - 1)]
        introduces = len(self.asked) < len(NUMBERS)
        replies = super().pull_messages(message_ids)
        self._queue.extend(reversed(held))
        self.clock[0] += 0.0 if introduces else SLOW_S
        return replies


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed: those of pauses, and those that the host takes."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(conversation.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(conversation.time, "sleep", sleep)
    return now


def play(
    folder: Path,
    clock: list[float],
    script: Script,
    *,
    networked: bool = False,
    pick: Callable[[int], int] = lambda count: 0,
    **server: object,
) -> Run:
    """One round, in which all four clients are asked unless ``server`` says otherwise."""
    config = scripted(rounds=1, server={"quorum": 1, "deadline_s": DEADLINE_S, **server})
    with loopback(4, {}), RunStore.create(folder, config) as store:
        grid = SlowHost(4, {}, None)
        grid.numbers, grid.texts, grid.asked, grid.clock = NUMBERS, {}, [], clock
        grid.script, grid.pick = script, pick  # type: ignore[method-assign,assignment]
        engine_of(config, store, networked=networked).start(grid)
    return Run(folder)


def answer(node: int, asked: Instruction) -> Reply:
    return send(scripted(), node, asked, constant(node + 1.0))


def outcomes(run: Run) -> dict[int, str]:
    return {row.node: row.status for row in run.nodes(round=1)}


def test_nobody_is_late_who_waits_for_a_turn(tmp_path: Path, clock: list[float]) -> None:
    """Four answers take 12 s; the deadline is 5 s, and for what is silent: client 1 answers nothing."""
    run = play(tmp_path / "run", clock, lambda node, asked: None if node == 1 else answer(node, asked))
    assert outcomes(run) == {0: "accepted", 1: "late", 2: "accepted", 3: "accepted"}
    (told,) = [event.message for event in run.events() if event.kind == "warning"]
    assert told == (
        "round 1 closed without 1 of its clients, as none answered for server.deadline_s = 5 seconds: "
        "a faster machine comes to other numbers"
    )


def test_over_a_network_the_deadline_is_one_for_all(tmp_path: Path, clock: list[float]) -> None:
    run = play(tmp_path / "run", clock, answer, networked=True)
    assert outcomes(run) == {0: "accepted", 1: "accepted", 2: "late", 3: "late"}
    assert [event for event in run.events() if event.kind == "warning"] == []


@pytest.mark.parametrize("last", [False, True], ids=["oldest first", "newest first"])
def test_whoever_answers_first_the_same_clients_count(last: bool, tmp_path: Path, clock: list[float]) -> None:
    """Client 0 fails, and client 2 is asked in its place; client 3 is not needed."""

    def script(node: int, asked: Instruction) -> Reply | str:
        return "killed" if node == 0 else answer(node, asked)

    pick: Callable[[int], int] = (lambda count: count - 1) if last else (lambda count: 0)
    run = play(tmp_path / "run", clock, script, pick=pick, sample=2, over_select=2)
    assert outcomes(run) == {0: "failed", 1: "accepted", 2: "accepted", 3: "unused"}
