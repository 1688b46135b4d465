"""What a simulation prints: a line a round for people, one document for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands.conftest import Fedllm


@pytest.fixture
def tiny(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    settings = (
        *(f"model.name={tiny_encoder}", f"data.path={tiny_texts}", "rounds=1", "clients=2"),
        *("training.local_steps=1", "training.batch_size=2", "data.max_length=8"),
    )
    return ["quickstart", "--no-report", *(word for one in settings for word in ("--set", one))]


def test_a_run_for_people(fedllm: Fedllm, tiny: list[str]) -> None:
    answer = fedllm("simulate", *tiny, "--out", "run")
    assert answer.code == 0
    rounds = [line for line in answer.err.splitlines() if line.startswith("round ")]
    assert [line.split()[:3] for line in rounds] == [["round", "0", "accuracy"], ["round", "1", "accuracy"]]
    assert "fewer" not in answer.err + answer.out
    name, *rest = answer.out.splitlines()
    assert name.startswith("quickstart: finished; accuracy 0.")
    scores = [json.loads(line)["accuracy"] for line in Path("run/rounds.jsonl").read_text().splitlines()]
    # Of equals the earliest is the best; told only where the last one is not.
    best = [] if scores[1] > scores[0] else [f"best accuracy {scores[0]:.4g} in round 0"]
    assert rest[: len(best)] == best
    assert rest[len(best)].startswith("moved ")
    assert rest[-1] == "results in run"


@pytest.mark.slow
def test_runs_of_a_sweep_begin_their_lines_with_their_names(fedllm: Fedllm, tiny: list[str]) -> None:
    answer = fedllm("simulate", *tiny, "--out", "all", "--seeds", "0..1")
    rounds = [line.split()[:3] for line in answer.err.splitlines() if "  round " in line]
    assert rounds == [[f"seed{seed}", "round", str(number)] for seed in (0, 1) for number in (0, 1)]


def test_a_run_for_programs(fedllm: Fedllm, tiny: list[str]) -> None:
    told = json.loads(fedllm("simulate", *tiny, "--out", "run", "--json").out)
    assert (told["name"], told["status"], told["rounds"]) == ("quickstart", "finished", 1)
    again = json.loads(fedllm("resume", "run", "--json").out)
    assert again == told


def test_what_would_run_is_printed_and_nothing_else(fedllm: Fedllm, tiny: list[str], tmp_path: Path) -> None:
    told = json.loads(fedllm("simulate", *tiny, "--seeds", "3..4", "--dry-run", "--json").out)
    assert [one["seed"] for one in told] == [3, 4]
    assert list(tmp_path.iterdir()) == []
