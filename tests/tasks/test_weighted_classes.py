"""Weights of classes and smoothed labels in the loss, and what knows none of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.tasks.classification import Classification
from strategies.registry import resolve_run

LOGITS = [[2.0, 0.0, -1.0], [0.5, 0.5, 0.0], [0.0, 3.0, 1.0], [-1.0, 0.0, 0.0]]
LABELS = [0, 2, 1, 0]


def loss(of: slice = slice(None), **training: Any) -> float:
    task = tasks.of(RunConfig.model_validate({"training": training}))
    return float(task.loss(torch.tensor(LOGITS)[of], torch.tensor(LABELS)[of], {}))


def naive(weights: list[float], smoothing: float, rows: range = range(4)) -> float:
    """The mean over texts of weight * sum_c target_c log(1 / p_c), written out."""
    total = 0.0
    for row in rows:
        whole = sum(math.exp(x) for x in LOGITS[row])
        for number, logit in enumerate(LOGITS[row]):
            target = smoothing / 3 + (1 - smoothing) * (number == LABELS[row])
            total += weights[LABELS[row]] * target * math.log(whole / math.exp(logit))
    return total / len(rows)


def test_each_text_counts_as_its_class_weighs() -> None:
    assert loss(class_weights=[0.5, 1.0, 4.0]) == pytest.approx(naive([0.5, 1.0, 4.0], 0.0))
    assert loss(class_weights=[1.0, 1.0, 1.0]) == pytest.approx(loss())


def test_a_smoothed_label_is_spread_over_all_classes() -> None:
    assert loss(label_smoothing=0.3) == pytest.approx(naive([1.0, 1.0, 1.0], 0.3))
    both = {"class_weights": [0.5, 1.0, 4.0], "label_smoothing": 0.3}
    assert loss(**both) == pytest.approx(naive([0.5, 1.0, 4.0], 0.3))


def test_the_losses_of_clients_are_that_of_all_texts() -> None:
    """Also of a client that holds one class only: a mean over weights would lose them there."""
    weights = {"class_weights": [0.5, 1.0, 4.0]}
    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]
    together = sum(loss(part, **weights) * len(LABELS[part]) for part in parts) / len(LABELS)
    assert together == pytest.approx(loss(**weights))


def test_a_run_without_them_has_the_plain_loss_to_the_bit() -> None:
    plain = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(LABELS))
    assert loss() == float(plain)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "training.class_weights=balanced",
            "training.class_weights = 'balanced' would be without effect: the loss of "
            'model.task = "causal" knows none; leave it out',
        ),
        (
            "training.label_smoothing=0.1",
            "training.label_smoothing = 0.1 would be without effect: the loss of "
            'model.task = "causal" knows none; leave it out',
        ),
    ],
)
def test_a_task_whose_loss_knows_none_refuses_them(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_run({"model": {"task": "causal", "name": "smollm2"}}, [override])
    assert str(refused.value) == sentence


def test_a_task_with_a_loss_of_its_own_refuses_them() -> None:
    class Hard(Classification):
        def loss(self, logits: torch.Tensor, labels: torch.Tensor, extra: Any) -> torch.Tensor:
            return (logits.argmax(-1) != labels).float().mean()

    with pytest.raises(ConfigError, match="would be without effect"):
        Hard(RunConfig.model_validate({"training": {"class_weights": [1.0, 2.0]}}))
    assert not Hard(RunConfig()).weighs


def test_there_is_a_weight_for_each_class() -> None:
    task = tasks.of(RunConfig.model_validate({"training": {"class_weights": [1.0, 2.0]}}))
    assert task.outputs(["ham", "spam"]) == 2
    with pytest.raises(ConfigError) as refused:
        task.outputs(["ham", "spam", "eggs"])
    assert str(refused.value) == (
        "training.class_weights lists 2 weights for 3 classes: give one for each of ham, spam, eggs"
    )


def test_balanced_is_numbers_by_the_time_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match="stands for numbers that fedllm simulate"):
        loss(class_weights="balanced")


@pytest.mark.parametrize("value", ["[1.0, 0.0]", "[1.0, inf]", "even", "[1.0, nan]", "[]", "4.0"])
def test_what_is_no_weight_is_refused(value: str) -> None:
    with pytest.raises(
        ConfigError, match=r'^training\.class_weights: .* is not "none", "balanced" or a list of'
    ):
        resolve_run({}, [f"training.class_weights={value}"])
