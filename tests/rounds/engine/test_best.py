"""The best round: its checkpoint stays as long as a run can go on from after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.runs.records import RoundRecord
from fedllm.runs.writer import RunStore
from tests.rounds.scripted import measured, scripted


def best_so_far(accuracies: list[float]) -> int:
    return accuracies.index(max(accuracies))


@pytest.mark.parametrize("kept", [(1, 0), (2, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize(
    "accuracies",
    [[0.1, 0.5, 0.3, 0.5, 0.2, 0.7, 0.6], [0.9, 0.1, 0.2, 0.3, 0.1, 0.0, 0.1]],
    ids=["up", "down"],
)
def test_beside_each_checkpoint_stays_that_of_the_best_round_of_its_time(
    tmp_path: Path, accuracies: list[float], kept: tuple[int, int]
) -> None:
    last, every = kept
    config = scripted(rounds=6, checkpoints={"last": last, "every": every})
    measured(config, tmp_path / "run", accuracies)
    plain = {*range(7 - last, 7), *(n for n in range(7) if every and n % every == 0)}
    best = {best_so_far(accuracies[: number + 1]) for number in plain}
    assert checkpoint.numbers(tmp_path / "run" / "checkpoints") == sorted(plain | best)


def test_stopped_and_resumed_the_best_round_is_the_same(tmp_path: Path) -> None:
    accuracies, config = [0.1, 0.5, 0.8, 0.3, 0.8, 0.2], scripted(rounds=5, checkpoints={"last": 1})
    folder = tmp_path / "run"
    for stop_in in (1, 3, 4, 0):
        reached = measured(config, folder, accuracies, stop_in).completed
        assert Run(folder).summary["best"]["round"] == best_so_far(accuracies[: reached + 1])
    assert checkpoint.numbers(folder / "checkpoints") == [2, 5]


def test_going_back_forgets_a_best_round_that_came_later(tmp_path: Path) -> None:
    accuracies, config = (
        [0.1, 0.6, 0.2, 0.3, 0.8, 0.2],
        scripted(rounds=5, checkpoints={"last": 1, "every": 3}),
    )
    folder = tmp_path / "run"
    measured(config, folder, accuracies)
    assert Run(folder).summary["best"]["round"] == 4
    Run(folder).go_on_from(3)
    other = [*accuracies[:4], 0.5, 0.5]
    measured(config, folder, other)
    best = Run(folder).summary["best"]
    assert (best["round"], best["value"]) == (1, 0.6)
    # It is still there to be had, though later rounds were better for a while.
    assert checkpoint.numbers(folder / "checkpoints") == [0, 1, 3, 5]


def test_the_round_of_which_a_kill_left_no_checkpoint_loses_no_best_one(tmp_path: Path) -> None:
    """The record of round 3, the best, was written; then the process was killed."""
    accuracies, config = [0.1, 0.6, 0.2, 0.9, 0.3], scripted(rounds=4, checkpoints={"last": 1})
    folder = tmp_path / "run"
    measured(config, folder, accuracies, stop_in=2)
    with RunStore.open(folder) as store:
        store.round(RoundRecord(round=3, metrics={"accuracy": 0.9}))
    assert Run(folder).summary["best"]["round"] == 3
    assert checkpoint.numbers(folder / "checkpoints") == [1, 2]
    measured(config, folder, [*accuracies[:3], 0.4, 0.3])
    assert Run(folder).summary["best"]["round"] == 1
    assert checkpoint.numbers(folder / "checkpoints") == [1, 4]
