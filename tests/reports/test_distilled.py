"""What FedKD's table adds: the like-for-like reference by hand, the gain against scipy, presets that pair."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from fedllm.config import RunConfig
from fedllm.runs import Run
from simulations.catalogue import document
from simulations.distilled import gain, notes
from simulations.reproduce import lay_out
from strategies.registry import resolve_run
from tests.reports.made_up import make_run

ACCURACIES = {
    "fedavg-teacher": (0.96, 0.97, 0.95),
    "fedkd": (0.95, 0.97, 0.96),
    "student-alone": (0.94, 0.96, 0.96),
}


def _runs(folder: Path, name: str, **config: object) -> list[Run]:
    return [
        make_run(folder / f"{name}-{seed}", (0.5, value), seed=seed, **{"name": name, **config})  # type: ignore[arg-type]
        for seed, value in enumerate(ACCURACIES[name])
    ]


def _preset(name: str) -> RunConfig:
    return resolve_run(document(name))


def test_the_frozen_reference_leaves_the_embedding_tables_out(
    tiny_encoder: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    tiny = {"model": {"name": str(tiny_encoder)}, "data": {"path": str(tiny_texts)}}
    runs = _runs(tmp_path, "fedavg-teacher", up=1000, method="fedavg", tuning={"peft": "full"}, **tiny)
    runs += _runs(tmp_path, "fedkd", up=20, **tiny) + _runs(tmp_path, "student-alone", up=10, **tiny)
    found = notes(runs)["frozen_reference"]
    assert 0 < found["embedding_parameters"] < found["parameters"]
    # Two rounds of two messages each way: 1,000 bytes up, of which 400 are dense tensors, and 300 down.
    share = found["embedding_parameters"] / found["parameters"]
    summary = runs[0].summary["bytes"]
    dense = summary["dense_up"] + summary["dense_down"]
    assert found["bytes"] == pytest.approx(4 * 1300 - dense * share)
    assert found["ratio"]["fedkd"] == pytest.approx(found["bytes"] / (4 * 320))
    assert found["ratio"]["student-alone"] == pytest.approx(found["bytes"] / (4 * 310))


def test_the_gain_of_distillation_is_paired_by_seed(tmp_path: Path) -> None:
    found = gain(_runs(tmp_path, "student-alone"), _runs(tmp_path, "fedkd"))
    expected = stats.ttest_rel(ACCURACIES["fedkd"], ACCURACIES["student-alone"]).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(0.02 / 3)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_fedkd_and_its_references_differ_in_nothing_but_what_they_compare() -> None:
    reference = _preset("fedavg-teacher")
    assert (reference.codec.up, reference.codec.down, reference.tuning.peft) == ("none", "none", "full")
    for name in ("fedkd", "fedkd-literal", "student-alone", "teacher-local"):
        other = _preset(name)
        for shared in ("seed", "clients", "rounds", "model", "data", "tuning", "server", "privacy"):
            assert getattr(other, shared) == getattr(reference, shared), (name, shared)
        rates = {"learning_rate": reference.training.learning_rate}
        assert other.training.model_copy(update=rates) == reference.training, name


def test_fedkd_compresses_updates_both_ways_with_feedback_and_the_literal_run_without() -> None:
    preset, literal, alone = (_preset(name) for name in ("fedkd", "fedkd-literal", "student-alone"))
    for text in (preset.codec.up, preset.codec.down):
        assert text.startswith("error_feedback(low_rank(energy=")
        assert "| quantize(bits=4) |" in text
    assert (preset.options["embeddings"], preset.options["literal"]) == ("frozen", False)
    assert all(preset.options[term] for term in ("teacher", "mutual", "hidden", "attention"))
    assert literal.codec.up == literal.codec.down == 'low_rank(energy="0.95->0.98")'
    assert (literal.options["embeddings"], literal.options["literal"]) == ("trained", True)
    assert (alone.codec, alone.options["teacher"]) == (preset.codec, False)
    assert alone.training == preset.training


def test_an_interrupted_experiment_leaves_whole_pairs(tmp_path: Path) -> None:
    names = [run.folder.name for run in lay_out("fedkd", [3, 4], "cpu", tmp_path)]
    assert names == [
        *(
            f"{preset}-seed{seed}"
            for seed in (3, 4)
            for preset in ("fedavg-teacher", "fedkd", "student-alone")
        ),
        "fedkd-literal-seed3",
        "teacher-local-seed3",
    ]
