"""Experiments at the papers' own scale: typed whole, and what they need reckoned without a download."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from simulations.experiments.cells import lay_out
from simulations.experiments.definition import Architecture, names, read
from simulations.experiments.paper_scale import needs, reckoned, stand_in
from tests.commands.conftest import Fedllm
from tests.commands.conftest import fedllm as fedllm


@pytest.mark.slow
@pytest.mark.parametrize("name", names("paper"))
def test_every_cell_is_whole_and_its_needs_are_known(name: str, tmp_path: Path) -> None:
    asked = read(name, "paper")
    assert asked.hardware is not None
    runs = lay_out(asked, tmp_path, reckon=reckoned(asked))
    assert {run.cell for run in runs} == set(asked.cells)
    assert len({run.config.seed for run in runs}) == 3
    for run in runs:
        assert run.config.model.name in asked.models
        assert "/" in run.config.data.name
        assert 1e8 < run.cost.memory < 1e9 * asked.hardware.memory_gb
        assert run.cost.seconds > 600


@pytest.mark.slow
def test_bytes_are_those_of_the_paper_and_follow_from_the_model(tmp_path: Path) -> None:
    """FedAvg sends four bytes a trained weight both ways; of BERT-base all 109.5 million are trained."""
    asked = read("fedkd", "paper")
    need = needs(asked)
    by_cell = {run.cell: run.config for run in lay_out(asked, tmp_path, seeds=[0])}
    exchanges = by_cell["fedavg"].rounds * by_cell["fedavg"].clients
    trained = need(by_cell["fedavg"]).moved / exchanges / 2 / 4
    assert trained == pytest.approx(109.5e6, rel=0.01)
    assert need(by_cell["fedpaq-16"]).moved == pytest.approx(need(by_cell["fedavg"]).moved / 2, rel=0.01)


@pytest.mark.slow
def test_sizes_that_are_another_models_are_refused(tmp_path: Path) -> None:
    asked = Architecture(kind="distilbert", million=66.4)
    assert stand_in(asked, tmp_path) == pytest.approx(66.4e6, rel=0.001)
    with pytest.raises(
        ConfigError, match=r"a distilbert of these sizes has 45.1 million parameters, not 66.4"
    ):
        stand_in(asked.model_copy(update={"sizes": {"n_layers": 3}}), tmp_path)
    with pytest.raises(ConfigError, match="kind = 'bort' is none that transformers knows"):
        stand_in(Architecture(kind="bort", million=1.0), tmp_path)


@pytest.mark.slow
def test_needs_are_printed_before_anything_starts(
    fedllm: Fedllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = fedllm("reproduce", "fwdllm", "--scale", "paper", "--list", "--only", "agnews-distilbert")
    assert "accelerator memory" in told.out
    assert "reckoned for a NVIDIA A40: 37.4 Tflop/s at 30 %, 48 GB" in told.err
    assert "of one NVIDIA A40" in told.err
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_described_is_named(tmp_path: Path) -> None:
    asked = read("fwdllm", "paper")
    config = lay_out(asked, tmp_path, seeds=[0])[0].config
    with pytest.raises(ConfigError, match="models describes no distilbert-base-uncased"):
        needs(asked.model_copy(update={"models": {}}))(config)
    with pytest.raises(ConfigError, match="nothing to reckon"):
        needs(asked.model_copy(update={"hardware": None}))


def test_at_the_papers_scale_there_are_others_than_on_two_cores() -> None:
    with pytest.raises(ConfigError, match=r"there is no experiment 'lora-codecs' at --scale paper"):
        read("lora-codecs", "paper")
    assert set(names("paper")) <= set(names())
