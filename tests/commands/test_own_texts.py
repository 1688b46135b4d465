"""A run over one's own texts: what nobody set is chosen from them, said, and written down."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import fedllm as package
from fedllm.config import RunConfig, read_toml
from fedllm.data.starting_point import SETTINGS, unset
from fedllm.errors import ConfigError
from fedllm.presets import document, presets
from fedllm.runs.reader import Run
from server.dashboard.actions.form import fields
from server.dashboard.actions.launch import Launcher
from strategies import starting_point
from strategies.registry import method_names, method_options, resolve_run
from strategies.starting_point import StartingPoint
from tests.commands.conftest import Fedllm


@pytest.fixture
def own(tiny_encoder: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    settings = (f"model.name={tiny_encoder}", f"data.path={tiny_texts}", "clients=2")
    return [word for one in settings for word in ("--set", one)]


def planned(answer: Any) -> list[dict[str, Any]]:
    assert answer.code == 0, answer.err
    told: list[dict[str, Any]] = json.loads(answer.out)
    return told


def test_a_dry_run_shows_what_is_chosen_and_why(fedllm: Fedllm, own: list[str], rows: list[Any]) -> None:
    answer = fedllm("simulate", *own, "--dry-run", "--json")
    (run,) = planned(answer)
    # 240 texts of 6 to 11 words and two special tokens, 192 of them trained on by two clients.
    assert run["name"] == "own"
    assert (run["data"]["max_length"], run["training"]["batch_size"]) == (16, 16)
    assert run["rounds"] * run["training"]["local_steps"] == 40
    assert run["training"]["learning_rate"] == 3e-3
    assert run["training"]["class_weights"] == "none"  # all classes are as common
    for key in set(SETTINGS) - {"training.class_weights"}:
        section, _, name = key.rpartition(".")
        value = run[section][name] if section else run[name]
        shown = json.dumps(value) if isinstance(value, str) else f"{value:g}"
        assert f"  {key} = {shown}: " in answer.err
    assert f"chosen from the {len(rows)} texts of " in answer.err


def test_what_was_set_stays_and_the_rest_follows(fedllm: Fedllm, own: list[str]) -> None:
    given = ["--set", "rounds=5", "--set", "data.max_length=9"]
    answer = fedllm("simulate", *own, *given, "--dry-run", "--json")
    (run,) = planned(answer)
    assert (run["rounds"], run["data"]["max_length"], run["training"]["local_steps"]) == (5, 9, 8)
    assert "  rounds = " not in answer.err
    assert "holds it back: " in answer.err


def test_a_preset_that_was_named_is_kept_to_the_letter(fedllm: Fedllm, own: list[str]) -> None:
    answer = fedllm("simulate", "quickstart", *own, "--dry-run", "--json")
    (run,) = planned(answer)
    assert run["training"] == {**run["training"], **document("quickstart")["training"]}
    assert (run["rounds"], run["data"]["max_length"]) == (8, 64)
    assert "chosen from" not in answer.err


@pytest.mark.parametrize("preset", [preset.name for preset in presets() if preset.name != "own"])
def test_a_preset_gives_all_that_could_be_chosen(preset: str) -> None:
    """Over any texts: nothing lies at the path, which is not looked at. A precision is the processor's."""
    config = resolve_run(document(preset), ["data.path=nothing.jsonl"])
    said: list[str] = []
    chosen = StartingPoint(said.append)(config)
    settled = {"model": config.model.model_copy(update={"dtype": chosen.model.dtype})}
    assert chosen == config.model_copy(update=settled)
    assert len(said) == (config.model.dtype == "auto")


def test_bundled_texts_are_not_ones_own(fedllm: Fedllm, tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text("rounds = 3\n")
    answer = fedllm("simulate", tmp_path / "short.toml", "--dry-run", "--json")
    (run,) = planned(answer)
    assert run["training"]["local_steps"] == RunConfig().training.local_steps
    assert answer.err == ""


def test_a_preset_for_other_texts_than_the_bundled_asks_for_them(
    fedllm: Fedllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = fedllm("simulate", "entities")
    assert answer.code == 2
    assert answer.err.startswith("error: data.name = 'bbcnews': ")
    assert answer.err.endswith("; data.path names other texts\n")
    assert list(tmp_path.rglob("rounds.jsonl")) == []


def test_a_file_of_ones_own_is_not_blamed_on_the_bundled_texts(
    fedllm: Fedllm, own: list[str], tmp_path: Path
) -> None:
    answer = fedllm("simulate", "entities", *own)
    assert answer.code == 2
    assert "bbcnews" not in answer.err
    assert "tiny.jsonl, line 1: there are no entities in the columns" in answer.err


def test_a_file_that_says_part_of_it_gets_the_rest(fedllm: Fedllm, own: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nlocal_steps = 3\n")
    (run,) = planned(fedllm("simulate", tmp_path / "mine.toml", *own, "--dry-run", "--json"))
    assert (run["training"]["local_steps"], run["rounds"]) == (3, 14)  # 40 steps
    # What comes out is whole: taken as a file, nothing in it is chosen again.
    assert unset(RunConfig.from_document(run)) == frozenset()


def test_repeats_and_baselines_begin_alike_and_it_is_said_once(fedllm: Fedllm, own: list[str]) -> None:
    answer = fedllm("simulate", *own, "--seeds", "0..2", "--dry-run", "--json")
    runs = planned(answer)
    assert len({json.dumps({**run, "seed": 0}) for run in runs}) == 1
    assert answer.err.count("chosen from") == 1
    (central,) = planned(fedllm("simulate", *own, "--baseline", "central", "--dry-run", "--json"))
    assert central["training"]["local_steps"] == 2 * runs[0]["training"]["local_steps"]
    assert central["rounds"] == runs[0]["rounds"]


@pytest.mark.slow
def test_skewed_clients_are_said_to_hold_a_run_back(fedllm: Fedllm, own: list[str]) -> None:
    skewed = ["--set", "data.partition=dirichlet", "--set", "data.alpha=0.1"]
    assert (
        "clients' classes differ from the whole's by 0." in fedllm("simulate", *own, *skewed, "--dry-run").err
    )
    assert "clients' classes" not in fedllm("simulate", *own, "--dry-run").err


@pytest.mark.parametrize("method", ["fwdllm", "mezo"])
def test_methods_without_steps_down_the_gradient_get_a_length_only(method: str, own: list[str]) -> None:
    config = resolve_run(document("own"), [*own[1::2], f"method={method}"])
    told: list[str] = []
    chosen = StartingPoint(told.append)(config)
    assert unset(config) - unset(chosen) == {"data.max_length"}
    assert chosen.data.max_length == 16
    assert len(told) == 2


def test_every_method_says_whether_its_clients_descend() -> None:
    stepping_otherwise = {name for name in method_names() if not method_options(name).descends}
    assert stepping_otherwise == {"fwdllm", "mezo"}


def test_a_server_takes_each_device_to_hold_as_many_texts_as_itself(own: list[str]) -> None:
    config = resolve_run(document("own"), own[1::2])
    told: list[str] = []
    deployed = StartingPoint(told.append, deployed=True)(config)
    # 5 passes over 240 texts in steps of 16; in a simulation two clients share 192.
    assert deployed.rounds * deployed.training.local_steps == pytest.approx(
        75, abs=deployed.training.local_steps
    )
    assert told[0].startswith("chosen from the server's 240 texts of ")
    assert "taking each of 2 devices to hold as many" in told[0]


def test_whoever_waits_is_told_what_for(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    told: list[str] = []
    asked = threading.Event()

    def say(sentence: str) -> None:
        told.append(sentence)
        asked.set()

    monkeypatch.setattr(starting_point, "PATIENCE_S", 0.0)
    look = starting_point._look

    def slowly(*given: Any) -> Any:
        assert asked.wait(240)
        return look(*given)

    monkeypatch.setattr(starting_point, "_look", slowly)
    StartingPoint(say)(resolve_run(document("own"), own[1::2]))
    assert told[0] == "looking at the texts, to choose what was not set ..."


def test_the_form_leaves_open_what_is_going_to_be_chosen(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, tmp_path)
    values = {field.key: field.value for field in fields(launcher.schemas(), launcher.document("own"))}
    assert {key for key in SETTINGS if values[key] is None} == set(SETTINGS)
    values = {field.key: field.value for field in fields(launcher.schemas(), launcher.document("quickstart"))}
    assert {key: values[key] for key in SETTINGS} == {
        "data.max_length": 64, "training.batch_size": 16, "training.local_steps": 4, "rounds": 8,
        "training.learning_rate": 3e-3, "training.schedule": "linear", "training.class_weights": "none",
    }  # fmt: skip


@pytest.mark.slow
def test_from_memory_it_is_the_same_and_a_resume_chooses_nothing(
    fedllm: Fedllm, own: list[str], rows: list[dict[str, str]], tiny_encoder: Path, tmp_path: Path
) -> None:
    few = {"rounds": 1, "training": {"local_steps": 1}}
    run = package.simulate(
        data=rows,
        model=str(tiny_encoder),
        clients=2,
        out=tmp_path / "run",
        report=False,
        progress=False,
        **few,
    )
    given = ["--set", "rounds=1", "--set", "training.local_steps=1"]
    (planned_here,) = planned(fedllm("simulate", *own, *given, "--dry-run", "--json"))
    written = read_toml(tmp_path / "run" / "config.toml")
    assert written["training"] == planned_here["training"]
    assert written["data"]["max_length"] == planned_here["data"]["max_length"] == 16
    assert unset(Run(run.folder).config) == frozenset()
    loaded = package.load_config(settings={"data.path": "given.jsonl"})
    assert unset(loaded) == set(SETTINGS)
    assert loaded.name == "own"


def test_balanced_classes_become_numbers_for_all_clients(
    fedllm: Fedllm, rows: list[dict[str, str]], tiny_encoder: Path, tmp_path: Path
) -> None:
    """4 texts of one class, 80 of another: 84 / (2 * 4), at most 10, and 84 / (2 * 80)."""
    metal, fruit = ([row for row in rows if row["label"] == name] for name in ("metal", "fruit"))
    file = tmp_path / "uneven.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in metal + fruit[:4]), encoding="utf-8")

    def dry(*words: str, settings: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
        given = (
            f"model.name={tiny_encoder}",
            f"data.path={file}",
            "clients=2",
            "tuning.targets=[]",
            *settings,
        )
        overrides = [word for one in given for word in ("--set", one)]
        answer = fedllm("simulate", *words, *overrides, "--dry-run", "--json")
        return planned(answer)[0], answer.err

    run, said = dry()
    assert run["training"]["class_weights"] == [10.0, 0.525]
    assert run["data"]["classes"] == ["fruit", "metal"]
    assert "  training.class_weights = [10.0, 0.525]: 'fruit' has 0.05 of the texts of 'metal'" in said
    # A preset that was named is kept; what it is asked for is found all the same.
    for method in ("lora", "fwdllm", "fedkd"):
        run, _ = dry("quickstart", settings=(f"method={method}", "training.class_weights=balanced"))
        assert run["training"]["class_weights"] == [10.0, 0.525]
        assert run["data"]["max_length"] == 64
    run, _ = dry(settings=("training.class_weights=none",))
    assert run["training"]["class_weights"] == "none"


@pytest.mark.slow
def test_a_run_that_is_submitted_holds_what_was_chosen(
    fedllm: Fedllm, own: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submitted: list[RunConfig] = []

    def submit(federation: Path, control: object, config: RunConfig) -> None:
        submitted.append(config)
        raise ConfigError("no federation is there")

    monkeypatch.setattr("server.federation.link.reached", lambda folder: nullcontext())
    monkeypatch.setattr("server.federation.serving.await_link", lambda folder, control: None)
    monkeypatch.setattr("server.federation.submit.submit", submit)
    answer = fedllm("run", *own, "--server", tmp_path)
    assert "taking each of 2 devices to hold as many" in answer.err
    (config,) = submitted
    assert unset(config) == {"training.class_weights"}  # which are even
    assert (config.name, config.data.max_length, len(config.data.classes)) == ("own", 16, 3)
    # What a dry run shows is what would be submitted, whether or not a federation is there.
    shown = fedllm("run", *own, "--dry-run", "--json")
    assert RunConfig.from_document(json.loads(shown.out)) == config
    assert fedllm("run", *own, "--dry-run").out == config.to_toml()
    assert len(submitted) == 1
    assert "--dry-run is for a new run" in fedllm("run", "--dry-run", "--resume", "x").err
