"""Macro-F1 and recall by class show what accuracy hides, from the arithmetic to the run that is watched."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedllm.config import RunConfig
from fedllm.protocol import wire
from fedllm.runs.reader import Run
from fedllm.tasks.metrics import by_class, classified, means, neglect, spread
from fedllm.terminal.live import Watcher
from server.rounds.exchange.told import averages
from simulations.results import report
from tests.rounds.federation import run

NAMES = ("a", "b", "c", "d")


def test_numbers_that_are_all_the_same_give_no_correlation() -> None:
    """Of the texts' own; a model that says one number for all of them is as good as none, which is 0."""
    from fedllm.tasks.regression import _Numbers

    scorer = _Numbers(np.ones(3), 2.0)
    scorer.predicted = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    assert scorer.scores(0.0) == {"rmse": pytest.approx(2 * math.sqrt(5 / 3))}
    scorer = _Numbers(np.array([1.0, 2.0]), 1.0)
    assert scorer.scores(0.0)["pearson"] == 0.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_agree_with_counting_text_by_text(pairs: list[tuple[int, int]]) -> None:
    """Precision and recall of each class by their definitions; F1 their harmonic mean."""
    found = classified(np.array([a for a, _ in pairs]), np.array([p for _, p in pairs]), NAMES)
    ones = []
    for k, name in enumerate(NAMES):
        hits = sum(a == p == k for a, p in pairs)
        texts, taken = sum(a == k for a, _ in pairs), sum(p == k for _, p in pairs)
        if not texts + taken:
            assert not any(key.endswith(f"/{name}") for key in found)
            continue
        precision, recall = hits / taken if taken else 0.0, hits / texts if texts else 0.0
        ones.append(2 * precision * recall / (precision + recall) if hits else 0.0)
        assert (found[f"texts/{name}"], found[f"predicted/{name}"]) == (texts, taken)
        assert found.get(f"recall/{name}") == (recall if texts else None)
    assert found["macro_f1"] == pytest.approx(sum(ones) / len(ones))
    assert found["accuracy"] == sum(a == p for a, p in pairs) / len(pairs)


def test_predicting_the_largest_class_only_is_accurate_and_worthless() -> None:
    """Of 100 texts 82 are of one class of three: accuracy .82, macro-F1 2 * .82 / 1.82 / 3."""
    actual = np.repeat([0, 1, 2], [82, 10, 8])
    scores, classes = by_class(classified(actual, np.zeros(100, dtype=np.int64), NAMES[:3]))
    assert scores == {"accuracy": 0.82, "macro_f1": pytest.approx(2 * 0.82 / 1.82 / 3), "mcc": 0.0}
    assert classes["a"] == {"texts": 82, "predicted": 100, "recall": 1.0}
    assert classes["c"] == {"texts": 8, "predicted": 0, "recall": 0.0}
    said = neglect(scores, classes)
    assert said is not None
    assert "every test text for 'a'" in said
    assert "macro-F1 0.3004" in said


def test_a_class_that_is_never_predicted_is_named() -> None:
    actual = np.array([0, 0, 1, 2, 3])
    said = neglect(*by_class(classified(actual, np.array([0, 0, 1, 1, 0]), NAMES)))
    assert said is not None
    assert "never predicts 'c', 'd'" in said
    assert neglect(*by_class(classified(actual, np.array([3, 2, 1, 0, 0]), NAMES))) is None
    # What does not occur in the test set cannot be missed.
    assert neglect(*by_class(classified(actual[:3], np.array([0, 0, 1]), NAMES))) is None


def test_clients_answer_with_what_can_be_averaged() -> None:
    """A mean of macro-F1s is no macro-F1; a perplexity's mean is that of its loss."""
    assert means({"loss": 1.0, "perplexity": 2.0, "macro_f1": 0.3, "recall/x": 1.0}) == {
        "loss": 1.0,
        "perplexity": 2.0,
    }
    replies = {
        node: wire.Reply(1, 0, examples, {"loss": loss, "perplexity": math.exp(loss)})
        for node, (examples, loss) in enumerate([(1, 1.0), (3, 3.0)])
    }
    assert averages(replies) == {"loss": 2.5, "perplexity": pytest.approx(math.exp(2.5))}


def test_how_differently_clients_fare_in_closed_form() -> None:
    """Of n equally spaced values the standard deviation is the step times sqrt((n^2 - 1) / 12)."""
    for higher in (True, False):
        values = [k / 8 for k in range(25)]  # a tenth of 25 clients is 3
        found = spread(values if higher else values[::-1], higher=higher)
        low, high = 1 / 8, 23 / 8
        assert found == {
            "clients": 25, "mean": 1.5, "std": pytest.approx(math.sqrt(52) / 8, rel=1e-15),
            "worst_tenth": low if higher else high, "best_tenth": high if higher else low, "gap": 22 / 8,
        }  # fmt: skip
    alone = {"clients": 1, "mean": 0.5, "std": 0.0, "worst_tenth": 0.5, "best_tenth": 0.5, "gap": 0.0}
    assert spread([0.5], higher=True) == alone
    assert [spread([0.25] * n, higher=True)["gap"] for n in (1, 9, 10, 11, 40)] == [0.0] * 5


@given(st.permutations([0.1, 0.7, 0.2, 0.30000000000000004, 0.3, 1e-9, 0.9, 0.11, 0.13, 0.17, 0.19]))
def test_in_whatever_order_clients_answer_the_bits_are_the_same(values: list[float]) -> None:
    assert spread(values, higher=True) == spread(sorted(values), higher=True)


@pytest.fixture(scope="module")
def one_sided(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose texts all look the same to the model, and what it showed: one answer for each."""
    folder = tmp_path_factory.mktemp("one-sided")
    rows = [{"text": f"unknown{i}", "label": "rare" if i < 8 else "frequent"} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document: dict[str, Any] = {
        "clients": 2,
        "rounds": 1,
        "model": {"name": str(tiny_encoder)},
        "data": {"path": str(folder / "texts.jsonl"), "max_length": 8, "test_fraction": 0.25},
        "tuning": {"peft": "head"},
        "training": {"local_steps": 2, "learning_rate": 0.1},
    }
    config = RunConfig.model_validate(document)
    shown = io.StringIO()
    watcher = Watcher(Console(file=shown, width=300))
    run(config, folder / "run")
    watcher.update(folder / "run")  # finds the run
    watcher.update(folder / "run")
    watcher.update(folder / "run")
    return folder / "run", shown.getvalue()


def test_a_run_that_predicts_one_class_says_so(one_sided: tuple[Path, str]) -> None:
    """Ten test texts, two of them rare: accuracy .8, macro-F1 (16/18 + 0) / 2."""
    folder, shown = one_sided
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["accuracy"] == 0.8
    assert summary["metrics"]["macro_f1"] == pytest.approx(16 / 18 / 2)
    assert json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])["macro_f1"] == pytest.approx(
        4 / 9
    )
    stored = Run(folder)
    last = stored.rounds()[-1]
    assert set(last.metrics) == {"accuracy", "macro_f1", "mcc", "loss"}
    assert last.details["classes"] == {
        "frequent": {"texts": 8, "predicted": 10, "recall": 1.0},
        "rare": {"texts": 2, "predicted": 0, "recall": 0.0},
    }
    said = "the model takes every test text for 'frequent'"
    warned = [event for event in stored.newest_events() if event.kind == "warning"]
    assert [event.message.startswith(said) for event in warned] == [True]
    page = report.render(stored, {})
    assert "the model takes every test text for &#39;frequent&#39;" in page
    assert '<td class="text">rare</td><td>2</td><td class="warn">0</td><td>0</td>' in page
    assert shown.count(f"warning: {said}") == 1
