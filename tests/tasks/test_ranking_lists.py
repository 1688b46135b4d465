"""What is ranked against what: the candidates of one query, whatever else belongs together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.config import DataConfig
from fedllm.data.corpus import load
from fedllm.errors import DataError
from fedllm.tasks.ranking import _Ranks
from tests.parts import task_of

QUERIES = ["apple", "pear", "plum", "melon"]
LISTED = [
    {"query": query, "candidates": ["iron", "zinc", "lead"], "clicks": [0, 1, 0], "story": k // 2}
    for k, query in enumerate(QUERIES)
]
APART = [
    {"query": row["query"], "text": text, "label": click, "story": row["story"]}
    for row in LISTED
    for text, click in zip(row["candidates"], row["clicks"], strict=True)
]


@pytest.mark.parametrize("rows", [LISTED, APART], ids=["lists", "rows"])
@pytest.mark.parametrize("group", [None, "story"])
def test_a_query_is_ranked_by_itself(
    rows: list[dict[str, Any]], group: str | None, tmp_path: Path, tiny_encoder: Path
) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of("ranking")
    corpus = load(DataConfig(path=str(file), group=group), task)
    tokens = task.encode(corpus, AutoTokenizer.from_pretrained(tiny_encoder), 16)
    lists = tokens.aside["group"].reshape(len(QUERIES), 3)
    assert (lists == lists[:, :1]).all()
    assert len(set(lists[:, 0])) == len(QUERIES)
    (note,) = task.notes(corpus, replace(tokens, cut=np.ones(len(tokens), dtype=np.bool_)))
    assert note.startswith(f"{len(corpus)} of {len(corpus)} texts were longer ")


@pytest.mark.parametrize("shift", [-60.0, 0.0, 60.0])
def test_scores_depend_on_the_order_alone(shift: float) -> None:
    """One click each, in places 1, 3 and 40 of forty: how large logits are says nothing of the order."""
    places, many = np.array([1, 3, 40]), 40
    clicks = np.eye(many, dtype=np.int64)[places - 1]
    ahead = torch.arange(many, 0, -1).repeat(3) + shift - many / 2
    scorer = _Ranks(np.repeat(np.arange(3), many), clicks.reshape(-1))
    scorer.add(
        np.arange(3 * many), torch.stack([torch.zeros_like(ahead), ahead], 1), torch.from_numpy(clicks)
    )
    found = scorer.scores(1.0)
    assert found["mrr"] == pytest.approx(np.mean(1 / places))
    assert found["auc"] == pytest.approx(np.mean((many - places) / (many - 1)))
    assert found["ndcg_10"] == pytest.approx(np.mean(np.where(places <= 10, 1 / np.log2(places + 1), 0)))


def test_queries_that_say_nothing_of_an_order_give_no_score() -> None:
    """All or none clicked: an AUC of 0 would be that of the worst order."""
    scorer = _Ranks(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    scorer.add(np.arange(4), torch.randn(4, 2), torch.zeros(4))
    assert scorer.scores(1.0) == {}


def test_a_tie_counts_half() -> None:
    scorer = _Ranks(np.zeros(3), np.array([1, 0, 0]))
    scorer.add(np.arange(3), torch.tensor([[0.0, -5.0], [0.0, -5.0], [0.0, -6.0]]), torch.zeros(3))
    assert scorer.scores(1.0)["auc"] == pytest.approx(0.75)


def test_clicks_of_a_csv_file_are_text(tmp_path: Path) -> None:
    file = tmp_path / "clicks.csv"
    file.write_text("query,text,label\nred,an apple,1\nred,iron,0\n", encoding="utf-8")
    found = load(DataConfig(path=str(file)), task_of("ranking"))
    assert [part["clicks"] for part in found.parts or []] == [[1], [0]]
    file.write_text("query,text,label\nred,an apple,2\n", encoding="utf-8")
    with pytest.raises(DataError, match="must hold 0 or 1, not '2'"):
        load(DataConfig(path=str(file)), task_of("ranking"))
