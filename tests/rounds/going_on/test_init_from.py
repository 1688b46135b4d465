"""A new run begins from the result of an earlier one, head included, and then needs that run no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, StoreError
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.tensors import Tensors
from server.rounds.earlier import start_of
from server.rounds.state import ServerState
from simulations import running
from simulations.engines.loopback import simulate
from strategies import session
from strategies.base import State
from strategies.registry import resolve_run
from tests.rounds.federation import DeviceGrid, configuration, run

SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"codec": {"down": "error_feedback(quantize(bits=4))"}, "options": {"rule": "residual"}},
    "fed-sb": {"method": "lora", "options": {"rule": "fed-sb"}},
    "fedavg": {"tuning": {}, "server": {"sample": 3, "optimizer": "adam"}},
    "fwdllm": {"options": {"directions": 3}},
    "mezo": {},
    "fedkd": {"options": {"layers": 1}},
}
"""Every method: with a base that moves, measured directions, moments, replayed steps, teachers."""

Of = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def of(tiny_encoder: Path, tiny_texts: Path) -> Of:
    def make(**sections: Any) -> RunConfig:
        return configuration(tiny_encoder, tiny_texts, **{"rounds": 2, "clients": 4, **sections})

    return make


@pytest.fixture(scope="module")
def lora(of: Of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of LoRA; leave it as it is."""
    folder = tmp_path_factory.mktemp("earlier") / "lora"
    run(of(), folder)
    return folder


def tensors(folder: Path, number: int) -> Tensors:
    return checkpoint.load(folder / "checkpoints", number).groups["tensors"]


def require_begun_from(folder: Path, source: Path) -> None:
    """Round 0 is the end of the source: its numbers to 1e-6, its tensors to the bit."""
    (*_, last), (first, *_) = Run(source).rounds(), Run(folder).rounds()
    assert first.metrics == pytest.approx(last.metrics, abs=1e-6)
    assert first.state_sha256 == last.state_sha256
    before, after = tensors(source, last.round), tensors(folder, 0)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert Run(folder).provenance["init_from"] == {
        "folder": str(source),
        "run": Run(source).identity,
        "round": last.round,
        "state_sha256": last.state_sha256,
    }


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.slow if name != "lora" else ()) for name in SECTIONS],
)
def test_round_0_is_the_end_of_the_earlier_run(of: Of, tmp_path: Path, method: str) -> None:
    sections = {"method": method, **SECTIONS[method]}
    source, folder = tmp_path / "source", tmp_path / "run"
    run(of(**sections), source)
    assert Run(source).rounds()[0].state_sha256 != Run(source).rounds()[-1].state_sha256
    run(of(**sections, init_from=str(source), rounds=1), folder)
    require_begun_from(folder, source)
    rows = [row for row in Run(folder).nodes() if row.exchange == "fit"]
    assert {row.status for row in rows} == {"accepted"}
    # Nobody is taken to have it: every client is sent it whole.
    whole = 4 * sum(tensor.numel() for tensor in tensors(source, 2).values())
    traffic = Run(folder).traffic(("node", "direction", "exchange", "record"), round=1)
    sent = [row for row in traffic if (row["direction"], row["record"]) == ("down", "payload")]
    assert [row["exchange"] for row in sent] == 3 * ["fit"]
    assert all(row["bytes"] == row["dense"] > whole for row in sent)


@pytest.mark.slow
def test_the_earlier_run_may_have_had_another_start_of_the_head_seed_and_data(
    of: Of, tmp_path: Path, lora: Path
) -> None:
    """What decides neither the model nor what is frozen in it may differ."""
    options = {"directions": 3, "warm_start": "ridge"}
    source, folder = tmp_path / "source", tmp_path / "run"
    run(of(method="fwdllm", options=options, rounds=1), source)
    options["warm_start"] = "none"
    run(of(method="fwdllm", options=options, init_from=str(source), rounds=1), folder)
    require_begun_from(folder, source)
    other = of(init_from=str(lora), seed=5, clients=3, rounds=1, codec={"up": "quantize(bits=8)"})
    run(other, tmp_path / "other")
    assert Run(tmp_path / "other").rounds()[0].state_sha256 == Run(lora).summary["state_sha256"]
    # Another seed holds out other texts, of which the earlier run has trained on some.
    warned = [
        any("may be in the test set here" in event.message for event in Run(place).events())
        for place in (folder, tmp_path / "other")
    ]
    assert warned == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, id="plain"),
        pytest.param({"codec": {"down": "quantize(bits=4)"}}, id="downlink"),
        pytest.param({"method": "mezo"}, id="replayed"),
        pytest.param({"options": {"rule": "hetero"}}, id="hetero"),
    ],
)
def test_clients_that_share_nothing_train_from_it_as_all_others_do(
    of: Of, tmp_path: Path, sections: dict[str, Any]
) -> None:
    source = tmp_path / "source"
    run(of(**sections, rounds=1), source)
    config = of(**sections, init_from=str(source), server={"sample": 2}, rounds=3)
    shared = run(config, tmp_path / "shared")
    apart = run(config, tmp_path / "apart", grid_of=DeviceGrid)
    assert shared["state_sha256"] == apart["state_sha256"]
    assert (shared["failures"], apart["failures"]) == (0, 0)


@pytest.mark.slow
def test_a_pool_comes_to_the_same_bits(of: Of, tmp_path: Path, lora: Path) -> None:
    config = of(init_from=str(lora)).placed(deployed=False)
    ends = []
    for workers in (1, 2):
        simulate(config, tmp_path / str(workers), workers, 1)
        ends.append(Run(tmp_path / str(workers)).summary["state_sha256"])
    assert ends[0] == ends[1] != Run(lora).summary["state_sha256"]


@pytest.mark.slow
def test_a_client_that_is_taken_to_have_the_start_says_that_it_has_not(
    of: Of, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It derives another version 0: the digest tells, and it is sent the right one."""
    config = of(init_from=str(lora), rounds=1)
    right = run(config, tmp_path / "right", grid_of=DeviceGrid)
    monkeypatch.setattr(ServerState, "begin", lambda initial, *, derived: ServerState(State(0, initial)))
    wrong = run(config, tmp_path / "wrong", grid_of=DeviceGrid)
    assert wrong["state_sha256"] == right["state_sha256"]
    assert wrong["bytes"]["down"] > right["bytes"]["down"]


@pytest.mark.slow
def test_a_run_goes_on_without_the_one_that_it_began_from(of: Of, tmp_path: Path, lora: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(lora, source)
    config = of(init_from=str(source))
    whole = run(config, tmp_path / "whole")

    def interrupt(message: Message) -> Message:
        if message.metadata.group_id == "1":
            raise KeyboardInterrupt
        return message

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", interrupt)
    shutil.rmtree(source)
    session.forget_sessions()  # as in another process
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert run(Run(moved).config, moved)["state_sha256"] == whole["state_sha256"]


@pytest.mark.slow
def test_a_run_without_a_checkpoint_yet_begins_again_from_the_same_or_not_at_all(
    of: Of, tmp_path: Path, lora: Path
) -> None:
    source, folder = tmp_path / "source", tmp_path / "run"
    shutil.copytree(lora, source)
    config = of(init_from=str(source), rounds=1)
    whole = run(config, folder)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(folder, tmp_path / "again")
    assert run(config, tmp_path / "again")["state_sha256"] == whole["state_sha256"]
    shutil.rmtree(source / "checkpoints" / "round-000002")
    with pytest.raises(StoreError, match=r"source has changed since \S+run was begun from it"):
        run(config, folder)


def damaged(source: Path) -> None:
    path = source / "checkpoints" / "round-000002" / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def without_checkpoints(source: Path) -> None:
    shutil.rmtree(source / "checkpoints")


def of_other_weights(source: Path) -> None:
    path = source / "provenance.json"
    told = json.loads(path.read_text())
    told["inputs"]["weights"] = "0" * 64
    path.write_text(json.dumps(told))


def of_no_known_weights(source: Path) -> None:
    path = source / "provenance.json"
    told = json.loads(path.read_text())
    del told["inputs"]
    path.write_text(json.dumps(told))


def of_other_classes(source: Path) -> None:
    path = source / "partition.json"
    told = json.loads(path.read_text())
    told["label_names"].reverse()
    path.write_text(json.dumps(told))


def not_finite(source: Path) -> None:
    state = ServerState.load(checkpoint.load(source / "checkpoints", 2))
    next(iter(state.current.tensors.values())).fill_(float("nan"))
    state.save(source / "checkpoints")


def gone(source: Path) -> None:
    shutil.rmtree(source)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (gone, "source holds no run"),
        (without_checkpoints, "source has no checkpoint yet: let it finish a round first"),
        (damaged, "round-000002 is damaged: tensors.safetensors does not match"),
        (of_other_weights, "was trained with the weights that .* take the same base model"),
        (of_no_known_weights, "nothing says whether model.name = .* is the base model of"),
        (of_other_classes, r"tells apart the classes metal, fruit, animal, .* have animal, fruit, metal"),
        (not_finite, "the result of .*source is not finite"),
    ],
)
def test_a_source_that_is_none_is_refused(
    of: Of, tmp_path: Path, lora: Path, change: Callable[[Path], None], sentence: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(lora, source)
    change(source)
    with pytest.raises(ConfigError, match=f"^init_from: (?s:.*){sentence}"):
        run(of(init_from=str(source)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"method": "mezo"},
            'is a run of method = "lora", and this one is of method = "mezo": take the same',
        ),
        ({"tuning": {"rank": 4, "targets": ("query", "value")}}, "tuning.rank = 2, and this run has tuning"),
        (
            {"tuning": {"rank": 2, "alpha": 8.0, "targets": ("query", "value")}},
            "has tuning.alpha = 4.0, and this run has tuning.alpha = 8.0: take the same",
        ),
        ({"options": {"rule": "stack"}}, r"and this run trains \(.*: take the same options of \[lora\]"),
        ({"options": {"rule": "ffa"}}, "and this run trains none: take the same options"),
    ],
    ids=["method", "rank", "scale", "more", "less"],
)
def test_a_result_that_does_not_fit_is_refused(
    of: Of, tmp_path: Path, lora: Path, sections: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(of(init_from=str(lora), **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_frozen_parts_of_another_seed_are_refused(of: Of, tmp_path: Path) -> None:
    """ffa never sends its factors A, which come of the seed."""
    source, ffa = tmp_path / "source", {"options": {"rule": "ffa"}}
    run(of(**ffa, rounds=1), source)
    sentence = "come of seed = 0, and those of this run do not, seed = 5: take the same seed"
    with pytest.raises(ConfigError, match=sentence):
        run(of(**ffa, seed=5, init_from=str(source)), tmp_path / "run")
    run(of(**ffa, rounds=1, init_from=str(source)), tmp_path / "run")
    require_begun_from(tmp_path / "run", source)


@pytest.mark.slow
def test_the_model_of_another_place_is_the_same(
    of: Of, tmp_path: Path, tiny_encoder: Path, lora: Path
) -> None:
    moved = shutil.copytree(tiny_encoder, tmp_path / "model")
    run(of(model={"name": str(moved), "dropout": 0.1}, init_from=str(lora), rounds=1), tmp_path / "run")
    require_begun_from(tmp_path / "run", lora)


def test_a_running_source_is_waited_for_by_whoever_asks(
    of: Of, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "pid", 1)
    with pytest.raises(ConfigError, match="lora is running: let it end first"):
        run(of(init_from=str(lora)), tmp_path / "run")


def test_a_warm_start_beside_it_is_refused_as_the_configuration_is_read() -> None:
    settings = ["init_from=runs/x", "method=fwdllm", "fwdllm.warm_start=ridge"]
    with pytest.raises(ConfigError, match=r"would replace the head that init_from brings: set fwdllm\.warm"):
        resolve_run({}, settings)


def test_the_source_is_named_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedllm.presets import document

    monkeypatch.chdir(tmp_path)
    assert resolve_run({}, ["init_from=runs/x"]).init_from == str(tmp_path / "runs" / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.toml").write_text('init_from = "{here}/x"\n')
    assert resolve_run(document("mine/run.toml")).init_from == str(tmp_path / "mine" / "x")


@pytest.mark.parametrize("place", ["source", "."], ids=["itself", "around"])
def test_a_run_does_not_replace_what_it_begins_from(of: Of, tmp_path: Path, lora: Path, place: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(lora, source)
    with pytest.raises(StoreError, match="lies where the new run would: choose another --out"):
        running.free(tmp_path / place, of(init_from=str(source)), True)
    assert Run(source).status == "finished"


def test_scaffold_begins_with_the_weights_and_without_control_variates(of: Of, tmp_path: Path) -> None:
    """Clients' own are no part of a result, and the server's would push every first step without them."""
    training = {"local_steps": 2, "batch_size": 8, "learning_rate": 5e-2, "optimizer": "sgd"}
    scaffold = of(method="scaffold", training=training)
    run(scaffold, tmp_path / "first")
    before = tensors(tmp_path / "first", 2)
    assert any(tensor.any() for name, tensor in before.items() if name.startswith("control/"))
    again = scaffold.model_copy(update={"init_from": str(tmp_path / "first")})
    begun = start_of(session.Session(again)).tensors
    assert begun.keys() == before.keys()
    for name, tensor in begun.items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name.startswith("control/") else before[name])
