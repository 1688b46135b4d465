"""``model.dtype = "auto"``: the processor is asked once, and the answer is the run's own from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedllm.errors import ModelError
from fedllm.models import model as models
from strategies.registry import resolve_run
from strategies.starting_point import StartingPoint
from tests.commands.conftest import Fedllm

NATIVE, CONVERTING = {"avx2": True, "amx_bf16": True}, {"avx2": True, "amx_bf16": False}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("FEDLLM_DEVICE", "cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: NATIVE, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("known", "deployed", "settings", "dtype", "why"),
    [
        (NATIVE, False, [], "bfloat16", "computed natively"),
        (CONVERTING, False, [], "float32", "no arithmetic"),
        ({}, False, [], "float32", "no arithmetic"),
        (NATIVE, True, [], "float32", "devices' processors"),
        (NATIVE, False, ["method=fedavg", "tuning.peft=full"], "float32", "leaves nothing frozen"),
        (NATIVE, False, ["method=mezo"], "float32", "measures slopes"),
        (NATIVE, False, ["method=mixed"], "float32", "measures slopes"),
    ],
)
def test_the_frozen_part_is_halved_where_that_is_native_and_loses_nothing(
    processor: pytest.MonkeyPatch,
    known: dict[str, bool],
    deployed: bool,
    settings: list[str],
    dtype: str,
    why: str,
) -> None:
    processor.setattr(torch.cpu, "get_capabilities", lambda: known)
    told: list[str] = []
    chosen = StartingPoint(told.append, deployed=deployed)(resolve_run({}, ["model.dtype=auto", *settings]))
    assert chosen.model.dtype == dtype
    (sentence,) = told
    assert sentence.startswith(f'model.dtype = "{dtype}": ')
    assert why in sentence


def test_what_was_settled_stays_on_another_processor(
    fedllm: Fedllm, processor: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = fedllm("simulate", "quickstart", "--set", "model.dtype=auto", "--dry-run")
    assert answer.code == 0, answer.err
    assert answer.err == 'model.dtype = "bfloat16": computed natively here\n'
    (tmp_path / "config.toml").write_text(answer.out)
    processor.setattr(torch.cpu, "get_capabilities", lambda: CONVERTING)
    again = fedllm("simulate", tmp_path / "config.toml", "--dry-run")
    assert (again.code, again.out, again.err) == (0, answer.out, "")


def test_where_no_run_is_started_it_has_to_be_said(tiny_encoder: Path) -> None:
    config = resolve_run({}, ["model.dtype=auto", f"model.name={tiny_encoder}"])
    with pytest.raises(ModelError, match=r"it has to be \"float32\" or \"bfloat16\""):
        models.load(config, ("a", "b"))
