"""A run goes back to an earlier round: later ones are gone, and clients that lack what they kept say so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedllm.config import RunConfig
from fedllm.errors import StoreError
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.tensors import fingerprint
from simulations.results.predict import export, predict, restore
from tests.parts import quick
from tests.rounds.federation import configuration, run

KEPT = {"every": 2, "last": 1}
FEEDBACK = "error_feedback(quantize(bits=4))"


@pytest.fixture(scope="module")
def make(tiny_encoder: Path, tiny_texts: Path) -> Any:
    def of(up: str) -> RunConfig:
        codec = {"up": up, "down": FEEDBACK}
        return configuration(
            tiny_encoder,
            tiny_texts,
            clients=3,
            rounds=5,
            server={},
            codec=codec,
            checkpoints=KEPT,
            evaluation={"every": 0},
        )

    return of


@pytest.fixture(
    scope="module", params=quick(["quantize(bits=8)", FEEDBACK], FEEDBACK), ids=["stateless", "residuals"]
)
def finished(request: pytest.FixtureRequest, make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("back") / "run"
    run(make(request.param), folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def told(folder: Path, kind: str) -> list[str]:
    return [event.message for event in Run(folder).events() if event.kind == kind]


def test_checkpoints_are_kept_by_a_setting(finished: Path) -> None:
    assert checkpoint.numbers(finished / "checkpoints") == [0, 2, 4, 5]


def test_the_model_of_an_earlier_round_is_there(finished: Path, tmp_path: Path) -> None:
    shas = {record.round: record.state_sha256 for record in Run(finished).rounds()}
    assert {n: fingerprint(restore(finished, n).tensors) for n in (0, 2)} == {n: shas[n] for n in (0, 2)}
    assert fingerprint(restore(finished).tensors) == shas[5]
    place = export(finished, tmp_path / "out", 2)
    assert "Scores after 2 of 5 rounds" in (place / "README.md").read_text()
    with pytest.raises(StoreError, match="has no checkpoint of round 3; its checkpoints are 0, 2, 4, 5"):
        predict(finished, ["a text"], 3)


@pytest.mark.slow
def test_clients_that_lack_their_state_of_a_round_begin_it_afresh_and_say_so(folder: Path) -> None:
    before = [record.state_sha256 for record in Run(folder).rounds()]
    stateless = Run(folder).config.codec.up != FEEDBACK
    Run(folder).go_on_from(2)
    assert run(Run(folder).config, folder)["status"] == "finished"
    after = [record.state_sha256 for record in Run(folder).rounds()]
    assert after[:3] == before[:3]
    lost = {(row.round, row.node) for row in Run(folder).nodes() if "state_lost" in row.metrics}
    (sentence,) = told(folder, "rolled back")
    assert sentence.startswith("goes on after round 2: what came after it, up to round 5, is forgotten")
    if stateless:  # nothing was kept, so nothing is missing: it comes out as before
        assert (after, lost, told(folder, "lost")) == (before, set(), [])
    else:
        assert lost == {(3, node) for node in range(3)}
        said = [sentence.partition(" no longer has its state")[0] for sentence in told(folder, "lost")]
        assert sorted(said) == ["client 0", "client 1", "client 2"]
        assert after[3:] != before[3:]


def test_the_result_is_that_of_the_last_checkpoint_or_is_not_there(folder: Path) -> None:
    assert (folder / "adapter").is_dir()

    def stop(message: Message) -> Message:
        Run(folder).post_command("stop", by="test")
        return message

    Run(folder).go_on_from(2)
    assert run(Run(folder).config, folder, stop)["status"] == "stopped"
    assert not (folder / "adapter").exists()


def test_what_cannot_be_gone_back_to_is_not_tried_again(folder: Path) -> None:
    before = Run(folder).rounds()
    (folder / "checkpoints" / "round-000002" / "tensors.safetensors").write_bytes(b"")
    Run(folder).go_on_from(2)
    with pytest.raises(StoreError, match=r"checkpoint .*round-000002 is damaged"):
        run(Run(folder).config, folder)
    assert (Run(folder).goes_on_from, Run(folder).status) == (None, "finished")
    assert Run(folder).rounds() == before
    assert (folder / "adapter").is_dir()


@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_passed_over_aloud(folder: Path) -> None:
    (folder / "checkpoints" / "round-000005" / "state.json").unlink()
    (folder / "checkpoints" / "round-000004" / "state.json").unlink()
    assert run(Run(folder).config, folder)["status"] == "finished"
    (sentence,) = told(folder, "rolled back")
    assert sentence.startswith("goes on after round 2: what came after it, up to round 5, is forgotten")
