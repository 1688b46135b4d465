"""A finished run is given more rounds: it ends as if it had been asked for all of them at once."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedllm.errors import ConfigError, StoreError
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from tests.commands.conftest import Fedllm
from tests.commands.conftest import fedllm as fedllm  # a fixture
from tests.rounds.federation import configuration, run

FEEDBACK = "error_feedback(quantize(bits=4))"
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"codec": {"up": "ef21(top_k(fraction=0.3))", "down": FEEDBACK}},
    "fed-sb": {"method": "lora", "options": {"rule": "fed-sb"}, "codec": {"up": FEEDBACK}},
    "fedavg": {"tuning": {}, "server": {"sample": 3, "optimizer": "adam"}, "codec": {"up": FEEDBACK}},
    "fwdllm": {"options": {"directions": 3, "warm_start": "ridge", "schedule": "constant"}},
    "mezo": {},
    "mixed": {"options": {"directions": 3}},
    "fedkd": {"options": {"layers": 1}, "codec": {"up": FEEDBACK, "down": FEEDBACK}},
}
"""Every method, each with something that goes from round to round: residuals, moments, scalars, teachers."""


@pytest.fixture
def of(tiny_encoder: Path, tiny_texts: Path) -> Any:
    def make(rounds: int, **sections: Any) -> Any:
        return configuration(tiny_encoder, tiny_texts, rounds=rounds, clients=4, **sections)

    return make


def traffic(folder: Path) -> list[dict[str, Any]]:
    """All that crossed but introductions, of which a session begins with its own."""
    rows = Run(folder).traffic(("round", "node", "direction", "exchange"))
    return [row for row in rows if row["exchange"] != "describe"]


@pytest.mark.slow
@pytest.mark.parametrize("method", SECTIONS)
def test_a_run_goes_on_after_its_end(of: Any, tmp_path: Path, method: str) -> None:
    sections = {"method": method, **SECTIONS[method]}
    whole = run(of(3, **sections), tmp_path / "whole")
    folder = tmp_path / "run"
    run(of(2, **sections), folder)
    with Run(folder).extended(3) as config:
        summary = run(config, folder)
    assert (summary["status"], summary["rounds"]) == ("finished", 3)
    assert summary["state_sha256"] == whole["state_sha256"]
    assert traffic(folder) == traffic(tmp_path / "whole")
    assert tomllib.loads((folder / "config.toml").read_text())["rounds"] == Run(folder).config.rounds == 3
    (event,) = [event for event in Run(folder).events() if event.kind == "extended"]
    assert event.message == "goes on after its end: 3 rounds in place of 2"
    assert event.fields == {"before": 2, "rounds": 3}


def test_a_run_that_goes_on_with_other_releases_says_so(of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(of(1), folder)
    for rounds, told in ((2, ""), (3, "goes on with torch")):
        if told:
            made = json.loads((folder / "provenance.json").read_bytes())
            made["versions"]["torch"] = "0.0.1"
            (folder / "provenance.json").write_text(json.dumps(made), encoding="utf-8")
        with Run(folder).extended(rounds) as config:
            run(config, folder)
        said = [event.message for event in Run(folder).events() if event.message.startswith("goes on with")]
        assert bool(said) == bool(told)
    assert said == [
        f"goes on with torch {version('torch')} in place of 0.0.1: later rounds may have other last digits"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"method": "fwdllm", "options": {"directions": 3, "schedule": "linear"}},
        {"method": "mezo", "training": {"local_steps": 2, "batch_size": 8, "schedule": "cosine"}},
        {"codec": {"down": 'low_rank(energy="0.5->0.99")'}},
    ],
    ids=["fwdllm", "mezo", "downlink"],
)
def test_a_client_that_missed_the_end_is_not_led_astray_by_the_new_progress(
    of: Any, tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Steps that it has yet to replay were taken when another share of the run was done."""
    folder = tmp_path / "run"
    run(of(2, seed=7, server={"sample": 1}, **sections), folder)
    with Run(folder).extended(4) as config:
        assert run(config, folder)["failures"] == 0
    rows = Run(folder).nodes()
    assert [row for row in rows if row.status != "accepted"] == []
    # Two came first only after the end.
    assert [row.node for row in rows if row.exchange == "fit"] == [1, 1, 2, 0]


@pytest.mark.slow
def test_a_run_that_was_killed_as_it_was_extended_goes_on(of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(of(1), folder)
    with Run(folder).extended(2) as config, RunStore.open(folder) as store:
        store.truncate(1)
        # As far as the file, and not as far as the database.
        (folder / "config.toml").write_text(config.to_toml())
    again = Run(folder)
    assert (again.status, again.config.rounds, again.goes_on_as.rounds) == ("interrupted", 1, 2)
    assert run(again.goes_on_as, folder)["status"] == "finished"
    assert (again.config.rounds, again.goes_on_as.rounds, len(again.rounds())) == (2, 2, 3)


@pytest.mark.slow
def test_an_extended_run_that_is_stopped_goes_on_as_any_other(of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(of(1), folder)

    def stop(message: Message) -> Message:
        Run(folder).post_command("stop", by="test")
        return message

    with Run(folder).extended(3) as config:
        assert run(config, folder, stop)["status"] == "stopped"
    with (
        pytest.raises(StoreError, match="run is stopped: let it finish its 3 rounds before it is given more"),
        Run(folder).extended(5),
    ):
        pass
    assert run(Run(folder).goes_on_as, folder)["rounds"] == 3


def test_what_is_refused_leaves_the_run_as_it_was(of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(of(2), folder)
    before = Run(folder).summary
    for total in (1, 2):
        sentence = f"has done 2 rounds and cannot go on to {total}: ask for more"
        with pytest.raises(StoreError, match=sentence), Run(folder).extended(total):
            pass
    (folder / "config.toml").write_text(of(2, seed=3).to_toml())
    with pytest.raises(StoreError, match="says seed = 3"), Run(folder).extended(3) as config:
        run(config, folder)
    again = Run(folder)
    assert (again.status, again.summary, again.goes_on_as) == ("finished", before, again.config)


@pytest.mark.slow
def test_more_rounds_on_the_command_line(of: Any, fedllm: Fedllm, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(of(1), folder)
    answer = fedllm("resume", folder, "--rounds", "+1")
    assert answer.code == 0, answer.err
    lines = [line.split() for line in answer.err.splitlines() if line.startswith("round ")]
    assert [number for _, number, *_ in lines] == ["0", "1", "2"]
    # Said again in all, it is done already.
    assert "is finished already" in fedllm("resume", folder, "--rounds", "2").err
    assert len(Run(folder).rounds()) == 3
    answer = fedllm("resume", folder, "--rounds", "1")
    assert (answer.code, "cannot go on to 1: ask for more than 2" in answer.err) == (1, True)
    for wrong in ("five", "-1", "1.5", "", "+"):
        answer = fedllm("resume", folder, f"--rounds={wrong}")
        assert answer.code == 2
        assert f"--rounds takes +N, so many more, or N, so many in all; got {wrong!r}" in answer.err
    answer = fedllm("run", "quickstart", "--rounds", "+1")
    assert (answer.code, "--rounds goes with --resume RUN" in answer.err) == (2, True)
    assert ConfigError.exit_code == 2
