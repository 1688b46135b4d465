"""FedKD's presets and those that it is compared with differ in nothing else."""

from __future__ import annotations

from fedllm.config import RunConfig
from fedllm.presets import document
from strategies.registry import resolve_run


def _preset(name: str) -> RunConfig:
    return resolve_run(document(name))


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
