"""A run that gets no better ends early, says so, and can be given more rounds all the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedllm.config import EvaluationConfig, RunConfig
from fedllm.runs.reader import Run
from fedllm.runs.records import RoundRecord
from fedllm.runs.summary import tries
from tests.commands.conftest import Fedllm
from tests.commands.conftest import fedllm as fedllm  # a fixture
from tests.reports.made_up import make_run
from tests.rounds.federation import configuration, let_measure, run
from tests.rounds.scripted import measured, scripted

ACCURACIES = [0.1, 0.5, 0.4, 0.5, 0.2, 0.3, 0.1, 0.2, 0.6, 0.1]


@pytest.mark.parametrize("stops", [(), (1,), (2,), (3,), (1, 2, 3)])
def test_stopped_and_resumed_it_ends_in_the_same_round(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """The best is of round 1; an equal value, of round 3, is no better one."""
    config = scripted(rounds=9, evaluation={"patience": 2})
    for stop_in in stops:
        assert measured(config, tmp_path / "run", ACCURACIES, stop_in).completed == stop_in
    engine = measured(config, tmp_path / "run", ACCURACIES)
    assert (engine.completed, engine.finished) == (3, True)


@pytest.mark.parametrize(
    ("patience", "every", "ends"),
    [(0, 1, 9), (1, 1, 2), (2, 1, 3), (6, 1, 7), (7, 1, 9), (1, 2, 4), (2, 2, 6), (1, 3, 6), (9, 1, 9)],
)
def test_patience_counts_evaluations(tmp_path: Path, patience: int, every: int, ends: int) -> None:
    """With every = 2 they are of rounds 0, 2, 4, ...: 0.1, 0.4, 0.2, 0.1, 0.6; with 3: 0.1, 0.5, 0.1, 0.1."""
    config = scripted(rounds=9, evaluation={"patience": patience, "every": every})
    assert measured(config, tmp_path / "run", ACCURACIES).completed == ends


def test_tries_are_counted_as_one_would_by_hand() -> None:
    for values in itertools.product((None, 1.0, 2.0), repeat=4):
        metrics: list[dict[str, Any]] = [{"accuracy": value, "loss": 1.0} for value in values]
        rounds = [RoundRecord(round=at, metrics=told) for at, told in enumerate(metrics)]
        count, best = 0, float("-inf")
        for at, value in enumerate(values):
            if value is not None and value > best:
                count, best = 0, value
            elif at > 0:  # the starting point is no try
                count += 1
        assert tries(rounds, "accuracy") == count


@pytest.fixture
def config(tiny_encoder: Path, tiny_texts: Path) -> RunConfig:
    return configuration(
        tiny_encoder, tiny_texts, clients=2, rounds=9, server={}, evaluation={"patience": 2},
        training={"local_steps": 1, "batch_size": 4, "learning_rate": 0.05}, checkpoints={"every": 1},
    )  # fmt: skip


@pytest.mark.slow
def test_what_ended_early_says_so_and_goes_on_if_asked(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    let_measure(monkeypatch, *ACCURACIES)
    summary = run(config, folder)
    sentence = (
        "ended after round 3 of 9: no better accuracy in 2 evaluations (evaluation.patience); "
        "the best, 0.5, is of round 1"
    )
    assert (summary["status"], summary["rounds"], summary["ended_early"]) == ("finished", 9, sentence)
    assert [event.message for event in Run(folder).events() if event.kind == "finished"] == [sentence]
    assert (folder / "adapter").is_dir()
    with Run(folder).going_on(None) as nothing:
        assert nothing is None
    whole = config.model_copy(update={"rounds": 6, "evaluation": EvaluationConfig()})
    let_measure(monkeypatch, *ACCURACIES)
    shas = {record.round: record.state_sha256 for record in _after(whole, tmp_path / "whole")}
    assert summary["state_sha256"] == shas[3]

    # Nine rounds in all were asked for before; asked for again, its patience is counted anew.
    def stop(message: Message) -> Message:
        if message.metadata.group_id == "4":
            Run(folder).post_command("stop", by="test")
        return message

    let_measure(monkeypatch, *ACCURACIES[4:])
    with Run(folder).going_on("9") as again:
        assert again is not None
        assert again.rounds == 9
        assert run(again, folder, stop)["ended_early"] is None
    (event,) = [event for event in Run(folder).events() if event.kind == "extended"]
    assert event.fields == {"before": 9, "rounds": 9}
    with Run(folder).going_on(None) as again:
        assert again is not None
        summary = run(again, folder)
    assert summary["ended_early"].startswith("ended after round 5 of 9: ")
    assert summary["state_sha256"] == shas[5]
    # Gone back to before that, it takes the same course.
    let_measure(monkeypatch, *ACCURACIES[3:])
    Run(folder).go_on_from(2)
    assert run(config, folder)["state_sha256"] == shas[5]
    # More rounds are counted from those that were done.
    let_measure(monkeypatch, *ACCURACIES[6:])
    with Run(folder).going_on("+1") as again:
        assert again is not None
        assert again.rounds == 6
        summary = run(again, folder)
    assert (summary["rounds"], summary["ended_early"], summary["state_sha256"]) == (6, None, shas[6])


def _after(config: RunConfig, folder: Path) -> list[RoundRecord]:
    run(config, folder)
    return Run(folder).rounds()


@pytest.mark.parametrize("rounds", [None, "5"])
def test_the_terminal_says_why(fedllm: Fedllm, tmp_path: Path, rounds: str | None) -> None:
    settings: dict[str, Any] = {"rounds": 9, "evaluation": {"patience": 4}}
    make_run(tmp_path / "run", (0.5, 0.25, 0.25, 0.25, 0.25), **settings)
    answer = fedllm("resume", tmp_path / "run", *(() if rounds is None else ("--rounds", rounds)))
    assert f"{tmp_path / 'run'} is finished already." in answer.err
    assert (
        "ended after round 5 of 9: no better accuracy in 4 evaluations (evaluation.patience); "
        "the best, 0.5, is of round 1\nbest accuracy 0.5 in round 1\n"
    ) in answer.out


def test_fewer_rounds_than_were_done_are_refused(fedllm: Fedllm, tmp_path: Path) -> None:
    make_run(tmp_path / "run", rounds=9, evaluation={"patience": 2})
    answer = fedllm("resume", tmp_path / "run", "--rounds", "2")
    assert "has done 3 rounds and cannot go on to 2" in answer.err
