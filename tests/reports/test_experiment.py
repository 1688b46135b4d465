"""What runs a command asks for: sweeps, seeds and baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from simulations.experiment import Baseline, Planned, parse_seeds, plan
from strategies.registry import resolve_run
from strategies.session import Session


def folders(planned: list[Planned], out: Path) -> list[str]:
    return [str(run.folder.relative_to(out)) for run in planned]


def test_the_runs_of_a_sweep_are_called_after_keys_and_values(tmp_path: Path) -> None:
    overrides = ["data.alpha=1.0,10.0,100.0", "rounds=4", "codec.up=none,quantize(bits=8)"]
    document = {"name": "trial", "data": {"partition": "dirichlet"}}
    planned = plan(document, overrides, out=tmp_path, seeds=[0, 7])
    assert len(planned) == 12
    assert folders(planned, tmp_path)[:3] == [
        "data.alpha=1.0-codec.up=none-seed0",
        "data.alpha=1.0-codec.up=none-seed7",
        "data.alpha=1.0-codec.up=quantize_bits=8-seed0",
    ]
    assert [run.config.data.alpha for run in planned[::4]] == [1.0, 10.0, 100.0]
    assert len({run.folder for run in planned}) == len(planned)
    assert {run.config.name for run in planned[:2]} == {"trial-data.alpha=1.0-codec.up=none"}


def test_names_stay_unique_where_a_folder_cannot_hold_what_tells_them_apart(tmp_path: Path) -> None:
    planned = plan({}, ["model.name=a/b,a:b,a b"], out=tmp_path)
    assert len(set(folders(planned, tmp_path))) == 3
    long = ",".join("x" * 300 + str(number) for number in range(3))
    planned = plan({"name": "n" * 100}, [f"model.name={long}"], out=tmp_path, seeds=[0])
    assert len(set(folders(planned, tmp_path))) == 3
    for run in planned:
        assert len(run.folder.name) <= 100
        assert type(run.config).from_json(run.config.to_json()) == run.config


@pytest.mark.parametrize("override", ["training.learning_rate=0.1,1e-1", "clients=3,3", "name=a,b"])
def test_one_run_is_not_made_twice(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are the same run: give every value and every seed once"):
        plan({}, [override], out=tmp_path)


def test_a_baseline_of_clients_is_not_one_run_many_times(tmp_path: Path) -> None:
    planned = plan({"clients": 3}, [], out=tmp_path, baseline="local")
    assert folders(planned, tmp_path) == ["client0", "client1", "client2"]


@pytest.mark.parametrize(
    ("method", "kind"), [("fwdllm", "central"), ("mixed", "central"), ("mixed", "local")]
)
def test_a_baseline_that_would_do_less_is_refused(method: str, kind: Baseline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f'--baseline {kind} would be none of method = "{method}"'):
        plan({"method": method}, [], out=tmp_path, baseline=kind)


@pytest.mark.parametrize(
    "shared",
    [
        {"partition": "natural", "by": "who"},
        {"partition": "pathological", "label": "who", "classes_per_client": 1},
        {"partition": "iid"},
    ],
)
def test_baselines_are_tested_on_what_the_federation_is_tested_on(
    tmp_path: Path, shared: dict[str, Any]
) -> None:
    """Conversations have no class of their own: who holds what decides what is held out of whom."""
    rows = [{"prompt": f"ask {n}", "response": f"say {n}", "who": "ab"[n % 4 == 0]} for n in range(100)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(file), "test_fraction": 0.1, "label": "", **shared}
    document = {"clients": 2, "model": {"name": "smollm2", "task": "instruct"}, "data": data}

    def sessions(baseline: Baseline | None) -> list[Session]:
        return [Session(run.config) for run in plan(document, [], out=tmp_path, baseline=baseline)]

    (federation,), (central,), local = sessions(None), sessions("central"), sessions("local")
    for baseline in (central, *local):
        assert baseline.split[1].texts == federation.split[1].texts
    assert [part.tolist() for part in central.partition] == [list(range(len(federation.split[0])))]
    assert [session.partition[0].tolist() for session in local] == [
        part.tolist() for part in federation.partition
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("4..0", r"--seeds 4\.\.0 runs backwards; write 0\.\.4"),
        ("1,5..3", r"--seeds 5\.\.3 runs backwards; write 3\.\.5"),
        ("0,0", "asks for seed 0 twice"),
        ("0..2,1", "asks for seed 1 twice"),
        ("a", "takes numbers and ranges"),
    ],
)
def test_seeds_that_cannot_be_meant_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_seeds(text)


def test_two_ways_to_say_the_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both say the seed"):
        plan({}, ["seed=3"], seeds=[0, 1], out=tmp_path)


def test_a_comma_in_a_files_name_makes_no_sweep(tmp_path: Path) -> None:
    file = tmp_path / "a,b.jsonl"
    file.write_text("{}")
    (run,) = plan({}, [f"data.path={file}"], out=tmp_path / "out")
    assert run.config.data.path == str(file)
    (run,) = plan({}, ['data.path="c,d.jsonl"'], out=tmp_path / "out")
    assert run.config.data.path == "c,d.jsonl"
    assert len(plan({}, ["data.path=c.jsonl,d.jsonl"], out=tmp_path / "out")) == 2
    with pytest.raises(ConfigError, match="a value is empty"):
        plan({}, ["data.path=c.jsonl,"], out=tmp_path / "out")


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../escape", "a/b", "..", ".hidden", "-rf", "", "x" * 101, "a\nb", "a b"]
)
def test_a_name_cannot_lead_out_of_the_folder_of_runs(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name: .* is not a run name: letters, digits and \. _ = -"):
        resolve_run({}, [f"name={json.dumps(name)}"])


def test_a_stored_configuration_reads_back_the_same(tmp_path: Path) -> None:
    for method in ("lora", "fwdllm", "fedkd", "fedavg"):
        config = resolve_run({"method": method, "data": {"label": ""}, "model": {"task": "causal"}})
        RunStore.create(tmp_path / method, config).close()
        assert type(config).from_document(config.to_document()) == config
        assert Run(tmp_path / method).config == config
