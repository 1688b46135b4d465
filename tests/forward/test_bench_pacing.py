"""The pacing benchmark in a small: it learns, counts what it asks for, and obeys the gate."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm.presets import document
from simulations.bench.pacing import Task, interpolated, train
from strategies.registry import resolve_run


@pytest.fixture(scope="module")
def task() -> Task:
    """Three classes around far directions of eight, in features as long as the head expects."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 8))

    def texts(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        rows = centres[labels] + 0.7 * generator.normal(size=(count, 8))
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return (unit * 8**0.5).astype(np.float32), labels

    return Task([texts(40), texts(60)], texts(300), 3)


def accuracy_and_directions(task: Task, *overrides: str) -> tuple[float, int]:
    return train(resolve_run(document("fwdllm"), ["rounds=10", *overrides]), task)


def test_a_fixed_count_is_what_it_says_and_learns(task: Task) -> None:
    accuracy, directions = accuracy_and_directions(task, "fwdllm.directions=20")
    assert directions == 10 * 2 * 20
    assert accuracy > 0.85


@pytest.mark.parametrize(
    ("rule", "threshold", "exchanges"),
    [("ratio", 1e-9, (1, 5)), ("ratio", 1e9, (5, 5)), ("variance", 1e9, (1, 1)), ("variance", 1e-30, (5, 5))],
)
def test_a_paced_round_asks_until_the_gate_or_the_cap(
    task: Task, rule: str, threshold: float, exchanges: tuple[int, int]
) -> None:
    _, directions = accuracy_and_directions(
        task,
        "fwdllm.directions=4",
        "fwdllm.max_exchanges=5",
        f"fwdllm.pacing={rule}",
        f"fwdllm.threshold={threshold}",
    )
    least, most = (10 * 2 * 4 * count for count in exchanges)
    assert least <= directions <= most


def test_between_counts_directions_are_interpolated_in_the_logarithm() -> None:
    curve = [(0.8, 100.0), (0.9, 10_000.0), (0.9, 20_000.0)]
    assert interpolated(curve, 0.8) == pytest.approx(100)
    assert interpolated(curve, 0.85) == pytest.approx(1000)
    assert interpolated(curve, 0.7) is None
    assert interpolated(curve, 0.91) is None
