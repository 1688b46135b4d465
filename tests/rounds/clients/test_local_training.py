"""Steps of local training, worked out by hand on a parabola; who sees which text when."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.config import TrainingConfig
from fedllm.data.tokens import Batch, Tokens
from fedllm.errors import RunFailed
from fedllm.models.training import descend, learning_rate, minibatches

NOTHING = Batch(*(torch.empty(0),) * 3)


def trained(
    steps: int, start: float = 1.0, progress: float = 0.0, **settings: Any
) -> tuple[float, list[float]]:
    """Descend 2 w^2, whose gradient is 4 w, from ``start``."""
    config = TrainingConfig.model_validate(
        {"optimizer": "sgd", "learning_rate": 0.125, "max_grad_norm": 0.0, "weight_decay": 0.0, **settings}
    )
    w = torch.nn.Parameter(torch.tensor([start]))
    losses = descend([w], lambda _: (2.0 * w.square()).sum(), [NOTHING] * steps, config, progress)
    return float(w.detach()), losses


def test_plain_steps_halve_the_value() -> None:
    assert trained(3) == (0.125, [2.0, 0.5, 0.125])


def test_the_proximal_term_pulls_back_to_where_the_round_began() -> None:
    """Gradient 4 w + mu (w - 1) with mu = 2 and rate 1/8: 1 -> 1/2 -> 1/2 - 1/8 (2 - 1) = 3/8 -> 11/32."""
    assert trained(1, proximal=2.0)[0] == 0.5  # at the start there is nothing to pull
    assert trained(2, proximal=2.0)[0] == 0.375
    value, losses = trained(3, proximal=2.0)
    assert value == 0.375 - 0.125 * (1.5 - 2 * 0.625)
    assert losses == [2.0, 0.5, 0.28125]  # of the task alone


def test_gradients_are_clipped_with_the_proximal_term_in_them() -> None:
    """1 -> 1 - 1/8, the gradient of 4 cut to 1; then 4 * 7/8 + 2 * (-1/8) = 3.25 is cut to 1 as well."""
    assert trained(2, proximal=2.0, max_grad_norm=1.0)[0] == pytest.approx(0.75, rel=1e-5)
    assert trained(1, max_grad_norm=8.0)[0] == 0.5  # a gradient within the bound is left alone


def test_weight_decay_shrinks_the_value() -> None:
    """1 - 1/8 (4 + 1)."""
    assert trained(1, weight_decay=1.0)[0] == 0.375


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", (1.0, 1.0, 1.0)), ("linear", (1.0, 0.75, 0.0)), ("cosine", (1.0, 0.8535533905932737, 0.0))],
)
def test_the_schedule_scales_the_step(schedule: str, factors: tuple[float, ...]) -> None:
    """Cosine at a quarter: (1 + sqrt(1/2)) / 2."""
    for progress, factor in zip((0.0, 0.25, 1.0), factors, strict=True):
        assert trained(1, progress=progress, schedule=schedule)[0] == pytest.approx(1.0 - 0.5 * factor)
        config = TrainingConfig.model_validate({"learning_rate": 3.0, "schedule": schedule})
        assert learning_rate(config, progress) == pytest.approx(3.0 * factor, abs=1e-12)


def test_adamw_takes_its_first_step_of_the_rate_and_decays_apart_from_the_gradient() -> None:
    """Loshchilov and Hutter: w <- w - rate * decay * w - rate * m / sqrt(v), whose ratio begins at 1."""
    value, _ = trained(1, start=2.0, optimizer="adamw", learning_rate=0.1, weight_decay=0.5)
    assert value == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1, rel=1e-6)


@pytest.mark.parametrize("start", [float("nan"), 1e30])
def test_a_loss_that_is_no_number_ends_the_training(start: float) -> None:
    with pytest.raises(RunFailed, match=r"lower training.learning_rate = 0\.125"):
        trained(1, start=start)


def texts(count: int) -> Tokens:
    """Texts of one token each, which is the text's own number."""
    numbers = np.arange(count)
    return Tokens(numbers.astype(np.int32), numbers, np.ones(count, dtype=np.int64), numbers % 2, 0)


def test_every_text_is_seen_once_in_each_pass_in_a_new_order() -> None:
    batches = [
        batch.input_ids.flatten().tolist() for batch in minibatches(texts(7), 3, 6, np.random.default_rng(0))
    ]
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1]
    first, second = ([*chain(*some)] for some in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second != list(range(7))


def test_there_are_as_many_batches_as_steps() -> None:
    seen = Counter(
        number
        for batch in minibatches(texts(2), 4, 5, np.random.default_rng(0))
        for number in batch.input_ids.flatten().tolist()
    )
    assert seen == {0: 5, 1: 5}
