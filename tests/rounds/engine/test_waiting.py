"""While clients are waited for: orders are obeyed, who leaves is noted, and the waiting is told as such."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fedllm.config import RunConfig
from fedllm.errors import RunFailed
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.reader import Run
from fedllm.runs.totals import node_totals
from fedllm.runs.writer import RunStore
from server.rounds import admission
from server.rounds.engine import Engine
from server.rounds.exchange import conversation as exchange
from simulations.engines.loopback import loopback
from tests.rounds.conftest import LeapingClock
from tests.rounds.scripted import ScriptedGrid, constant, engine_of, scripted, send

CONFIG = scripted(rounds=2, server={"quorum": 3, "deadline_s": 60.0})
CONFIG_OF_TWENTY_SECONDS = scripted(rounds=2, server={"quorum": 3, "deadline_s": 20.0})


class ComingAndGoing(ScriptedGrid):
    """Calls ``looked`` with how often it was asked who is online; what that returns is away."""

    looked: Callable[[int], set[int]]
    times = 0

    def get_node_ids(self) -> Iterable[int]:
        self.times += 1
        away = self.looked(self.times)
        return [flower for flower, node in self.numbers.items() if node not in away]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_POLL_S", 0.001)
    monkeypatch.setattr(exchange, "_LOOK_S", 0.0)


def answer(node: int, asked: Instruction) -> Reply | None:
    return send(CONFIG, node, asked, constant(1.0))


def play(
    folder: Path,
    looked: Callable[[int], set[int]],
    script: Callable[[int, Instruction], Reply | None] = answer,
    config: RunConfig = CONFIG,
) -> Engine:
    with loopback(4, {}), RunStore.create(folder, config) as store:
        grid = ComingAndGoing(4, {}, None)
        grid.numbers, grid.texts, grid.asked = {100 + node: node for node in range(4)}, {}, []
        grid.script = script  # type: ignore[method-assign,assignment]
        grid.looked = looked  # type: ignore[method-assign,assignment]
        engine = engine_of(config, store)
        engine.start(grid)
    return engine


def kinds(folder: Path) -> list[tuple[str, int | None]]:
    noted = ("left", "back", "pause", "resume", "stop", "release")
    return [(event.kind, event.fields.get("node")) for event in Run(folder).events() if event.kind in noted]


def test_a_stop_is_obeyed_while_clients_are_waited_for(tmp_path: Path, leaping_clock: LeapingClock) -> None:
    folder = tmp_path / "run"

    def looked(times: int) -> set[int]:
        if times == 5:
            Run(folder).post_command("stop", by="operator")
        return {0, 1}

    engine = play(folder, looked)
    assert (engine.finished, leaping_clock.paused < 1) == (False, True)
    assert kinds(folder) == [("stop", None)]


def test_a_release_is_obeyed_while_the_quorum_waits_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def script(node: int, asked: Instruction) -> Reply | None:
        if (node, asked.round) == (0, 1):
            for other in (2, 3):
                Run(folder).post_command("quarantine", by="operator", node=other)
        return answer(node, asked)

    def looked(times: int) -> set[int]:
        run = Run(folder)
        if run.phase.get("name") == "waiting for clients" and not kinds(folder):
            run.post_command("release", by="operator", node=2)
        return set()

    assert play(folder, looked, script).finished
    assert ("release", 2) in kinds(folder)


def test_while_paused_the_deadline_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, clock = tmp_path / "run", [0.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: clock[0])

    def looked(times: int) -> set[int]:
        clock[0] += 25.0
        if times == 1:
            Run(folder).post_command("pause", by="operator")
        if times == 8:
            Run(folder).post_command("resume", by="operator")
        return {0, 1} if times < 11 else set()

    assert play(folder, looked).finished
    assert [kind for kind, _ in kinds(folder) if kind in ("pause", "resume")] == ["pause", "resume"]


def test_who_leaves_and_comes_back_in_a_round_is_noted(tmp_path: Path) -> None:
    folder, looks = tmp_path / "run", 0

    def script(node: int, asked: Instruction) -> Reply | None:
        return None if (node, asked.round) == (3, 2) else answer(node, asked)

    def looked(times: int) -> set[int]:
        nonlocal looks
        looks += Run(folder).phase.get("round") == 2
        return {3} if 0 < looks < 4 else set()

    assert play(folder, looked, script, config=CONFIG_OF_TWENTY_SECONDS).finished
    assert kinds(folder) == [("left", 3), ("back", 3)]


def test_a_node_that_is_gone_shows_as_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    engine = play(folder, lambda times: {3} if times > 3 else set())
    assert engine.finished
    assert [row.state for row in node_totals(folder)] == ["ok", "ok", "ok", "gone"]


def test_waiting_is_no_progress(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", CONFIG) as store:
        phases = []
        for have in (1, 1, 2):
            store.phase("waiting for clients", have=have, need=3)
            phases.append(Run(store.folder).phase)
        assert phases[0]["since"] == phases[2]["since"]
        assert phases[0]["moved_at"] == phases[1]["moved_at"] < phases[2]["moved_at"]
        store.phase("fit", round=1, have=0, need=3)
        assert Run(store.folder).phase["since"] > phases[2]["since"]


def test_too_few_clients_still_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: clock[0])

    def looked(times: int) -> set[int]:
        clock[0] += 25.0
        return {0, 1}

    with pytest.raises(RunFailed, match="2 of 4 clients came"):
        play(tmp_path / "run", looked)
