"""A folder is taken for the run that is asked for only if it is that run."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

from fedllm.cli import app
from fedllm.config import DataConfig, ModelConfig, RunConfig, ServerConfig
from fedllm.errors import ConfigError, DataError, StoreError
from fedllm.runs.writer import RunStore
from server.federation.submit import resume
from server.rounds.conduct import conduct

CONFIG = RunConfig(
    model=ModelConfig(name="./no-model"), data=DataConfig(path="no-data.jsonl"), rounds=3
).placed(deployed=False)
"""Cannot be run: whoever refuses it for its folder has not looked at model or data yet."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RunStore.create(tmp_path / "runs" / "run", CONFIG, {"run": "0a1b2c"}).close()
    return tmp_path / "runs" / "run"


def contents(folder: Path) -> dict[str, bytes]:
    # A reader of SQLite leaves side files that hold nothing.
    return {path.name: path.read_bytes() for path in folder.iterdir() if "run.db-" not in path.name}


def edit(folder: Path) -> None:
    told = folder / "config.toml"
    told.write_text(told.read_text().replace("rounds = 3", "rounds = 30"))


def test_another_configuration_does_not_go_on_with_a_run(folder: Path) -> None:
    before = contents(folder)
    other = CONFIG.model_copy(update={"clients": 7, "rounds": 5})
    with pytest.raises(StoreError, match="holds a run with clients = 10, asked was clients = 7: choose an"):
        conduct(Mock(), other, folder)
    assert contents(folder) == before


def test_an_edited_configuration_is_not_ignored(folder: Path) -> None:
    edit(folder)
    before = contents(folder)
    sentence = r"config.toml says rounds = 30, but the run was begun with rounds = 3: undo the edit, or start"
    with pytest.raises(StoreError, match=sentence):
        conduct(Mock(), CONFIG, folder)
    with pytest.raises(StoreError, match=sentence):
        resume(folder.parents[1], Mock(), "run")
    assert contents(folder) == before


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_resume_refuses_an_edited_configuration(folder: Path, status: str) -> None:
    with RunStore.open(folder) as store:
        store.finish(status)  # type: ignore[arg-type]
    edit(folder)
    failed = CliRunner().invoke(app, ["resume", str(folder)])
    assert isinstance(failed.exception, StoreError)
    assert "says rounds = 30" in str(failed.exception)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("rounds = ", "is not what the run was begun with: .*; undo the edit"), ('nonsense = "1"', "nonsense")],
)
def test_a_configuration_that_cannot_be_read_is_named(folder: Path, text: str, sentence: str) -> None:
    (folder / "config.toml").write_text(text)
    with pytest.raises(StoreError, match=sentence):
        conduct(Mock(), CONFIG, folder)


@pytest.mark.parametrize("left", [None, "{}", '{"engine": "loopback"}', "{"])
def test_a_run_that_does_not_say_who_it_is_does_not_go_on(folder: Path, left: str | None) -> None:
    path = folder / "provenance.json"
    path.unlink()
    if left is not None:
        path.write_text(left)
    before = contents(folder)
    with pytest.raises(StoreError, match=r"provenance\.json"):
        conduct(Mock(), CONFIG, folder)
    assert contents(folder) == before


def test_a_missing_configuration_file_does_not_stop_a_run(folder: Path) -> None:
    (folder / "config.toml").unlink()
    with pytest.raises(DataError, match=r"no-data\.jsonl"):
        conduct(Mock(), CONFIG, folder)


def test_a_run_of_before_a_default_goes_on_under_it(tmp_path: Path) -> None:
    """What ends this one comes after its folder was found to be the right one."""
    old = CONFIG.model_copy(update={"server": ServerConfig()})
    assert old.server.weight_ratio is None
    RunStore.create(tmp_path / "run", old, {"run": "0a1b2c"}).close()
    with pytest.raises(DataError, match=r"no-data\.jsonl"):
        conduct(Mock(), old, tmp_path / "run")


def test_a_run_cannot_be_named_out_of_its_folder() -> None:
    failed = CliRunner().invoke(app, ["simulate", "--dry-run", "--set", "name=../../escape"])
    assert isinstance(failed.exception, ConfigError)
    assert "'../../escape' is not a run name" in str(failed.exception)
