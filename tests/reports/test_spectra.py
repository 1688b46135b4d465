"""Spectra of what rounds changed: shares of energy that can be told beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm.runs import checkpoint
from simulations.experiments import spectra

WEIGHT = "layer.0.attention.query.weight"
WIDE = "layer.0.intermediate.dense.weight"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Round 1 adds a matrix of rank one to one layer, and diag(3, 4) to another; round 2 adds more."""
    column, row = torch.randn(8, 1), torch.randn(1, 4)
    steps = [
        {WEIGHT: torch.zeros(8, 4), WIDE: torch.ones(2, 2), "head.weight": torch.zeros(2, 4)},
        {WEIGHT: column @ row, WIDE: torch.ones(2, 2) + torch.diag(torch.tensor([3.0, 4.0]))},
        {WEIGHT: column @ row + torch.eye(8, 4), WIDE: torch.ones(2, 2)},
    ]
    for number, tensors in enumerate(steps):
        whole = {"head.weight": torch.full((2, 4), float(number)), **tensors}
        checkpoint.save(tmp_path / "checkpoints", number, {"tensors": whole}, {}, keep=9)
    return tmp_path


def test_energy_is_the_share_of_squared_singular_values(run: Path) -> None:
    found = spectra.of_run(run)
    assert set(found) == {(kind, number) for kind in ("attention", "feed-forward") for number in (1, 2)}
    assert found["attention", 1][25] == pytest.approx(1.0)  # the first of four is all there is
    assert found["attention", 2][[25, 50, 100]] == pytest.approx([0.25, 0.5, 1.0])
    assert found["feed-forward", 1][[50, 100]] == pytest.approx([16 / 25, 1.0])


def test_a_round_without_the_one_before_is_left_out(run: Path) -> None:
    import shutil

    shutil.rmtree(run / "checkpoints" / "round-000001")
    assert not spectra.of_run(run)
    assert not spectra.figures({"plain": run})


def test_first_and_last_round_of_each_kind_are_drawn(run: Path) -> None:
    ((caption, figure),) = spectra.figures({"plain-seed0": run}).values()
    assert caption.endswith("plain-seed0")
    lines = figure.axes[0].get_lines()
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    assert lines[0].get_ydata()[25] == pytest.approx(100.0)
    assert np.all(np.diff(lines[3].get_ydata()) >= 0)
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told[:2] == ["attention, round 1", "attention, round 2"]


def test_a_round_that_changed_nothing_has_no_energy() -> None:
    assert spectra.energies(torch.zeros(3, 3)).max() == 0.0
