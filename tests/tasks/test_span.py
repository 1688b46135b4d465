"""Quoting answers: rows and labels of long texts, the best span, SQuAD's scores, what is shown."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.data.corpus import Corpus, load, split
from fedllm.data.reading import Row
from fedllm.data.tokens import Tokens
from fedllm.errors import ConfigError, DataError, ModelError
from fedllm.models.model import load as load_model
from fedllm.tasks.base import Task
from fedllm.tasks.span import best_span, squad
from tests.tasks.pieces import by_letters

CONTEXT = "ab cd, efg hi jk lm no pq rs tu"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return by_letters()


def quoting(**sections: Any) -> Task:
    return tasks.of(RunConfig.model_validate({"model": {"task": "span"}, **sections}))


def question(text: str, context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"question": text, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


def corpus_of(task: Task, *rows: dict[str, Any]) -> Corpus:
    return load(
        task.config.data, task, None, (Row(row, "a.jsonl", f"line {n}") for n, row in enumerate(rows, 1))
    )


def quoted(tokens: Tokens, row: int, context: str) -> str:
    """What a row's labels quote."""
    assert tokens.places is not None
    assert tokens.labels is not None
    first, last = (int(tokens.starts[row]) + int(place) for place in tokens.labels[row])
    return context[tokens.places[first, 0] : tokens.places[last, 1]]


@pytest.mark.parametrize("answer", ["ab", "cd, efg", "fg h", "tu", CONTEXT])
def test_labels_are_the_tokens_of_the_answer(tokenizer: Any, answer: str) -> None:
    task = quoting()
    corpus = corpus_of(task, question("who", CONTEXT, answer))
    tokens = task.encode(corpus, tokenizer, 64)
    assert len(tokens) == 1
    assert quoted(tokens, 0, CONTEXT) == answer
    batch = tokens.batch([0])
    kinds = batch.extra["token_type_ids"][0].tolist()
    assert kinds == [0] * len("[who]") + [1] * (len(kinds) - 5)
    assert batch.extra["inside"][0].tolist() == [0] * 5 + [1] * (len(kinds) - 6) + [0]


def test_long_texts_become_rows_that_overlap(tokenizer: Any) -> None:
    task = quoting()
    answer = "hi"
    corpus = corpus_of(task, question("who", CONTEXT, answer), question("x", "ab", "ab"), question("y", "ab"))
    tokens = task.encode(corpus, tokenizer, 15)
    assert tokens.owners is not None
    assert tokens.labels is not None
    rows = tokens.rows_of(0)
    assert len(rows) > 2
    assert all(tokens.lengths[row] <= 15 for row in rows)
    covered: set[int] = set()
    for row in rows:
        places = tokens.places[tokens.starts[row] :][: tokens.lengths[row]]  # type: ignore[index]
        here = {place for start, end in places for place in range(start, end)}
        assert not covered or covered & here
        whole = set(range(CONTEXT.index(answer), CONTEXT.index(answer) + 2)) <= here
        assert tokens.labels[row].any() == whole
        assert not whole or quoted(tokens, row, CONTEXT) == answer
        covered |= here
    assert covered == {place for place, one in enumerate(CONTEXT) if one != " "}
    assert tokens.labels[tokens.rows_of(2)].tolist() == [[0, 0]]


def test_what_is_lost_is_counted(tokenizer: Any) -> None:
    task = quoting(data={"max_length": 15})
    rows = [question("who is it that asks", CONTEXT, CONTEXT), question("x", "ab", "ab")]
    corpus = corpus_of(task, *rows)
    said = task.notes(corpus, task.encode(corpus, tokenizer, 15))
    assert [sentence.split(" were")[0].split(" are ")[0].split(" take")[0] for sentence in said] == [
        "1 of 2 questions with their texts",
        "1 of 2 questions",
        "1 of 2 answers",
    ]


def test_questions_to_one_text_stay_together() -> None:
    task = quoting()
    corpus = corpus_of(task, *(question(f"q{n}", f"text {n // 3}") for n in range(30)))
    train, test = split(corpus, 0.2, 0)
    contexts = [{part["context"] for part in side.parts or []} for side in (train, test)]
    assert not contexts[0] & contexts[1]


def test_no_room_is_one_sentence(tokenizer: Any) -> None:
    task = quoting()
    corpus = corpus_of(task, question("who", CONTEXT, "ab"))
    with pytest.raises(DataError, match=r"data.max_length = 4 leaves no room .*set it to 5 at least"):
        task.encode(corpus, tokenizer, 4)
    assert len(task.encode(corpus, tokenizer, 5)) > 1


def test_loss_is_the_cross_entropy_over_the_text_whatever_the_padding(tokenizer: Any) -> None:
    task = quoting()
    corpus = corpus_of(
        task, question("who", "ab cd", "cd"), question("w", CONTEXT * 2), question("x", "ab", "b")
    )
    tokens = task.encode(corpus, tokenizer, 64)
    pick = torch.Generator().manual_seed(0)
    logits = torch.randn(3, int(tokens.lengths.max()), 2, generator=pick)
    alone = []
    for row in range(3):
        batch = tokens.batch([row])
        inside = [0, *(i for i, one in enumerate(batch.extra["inside"][0].tolist()) if one)]
        for side in (0, 1):
            values = [math.exp(float(logits[row, i, side])) for i in inside]
            target = inside.index(int(batch.labels[0, side]))
            alone.append(-math.log(values[target] / sum(values)))
    batch = tokens.batch(range(3))
    found = task.loss(logits, batch.labels, batch.extra)
    assert float(found) == pytest.approx(np.mean(alone), rel=1e-5)
    # What one model teaches another is two distributions over positions for each row, first and last token.
    shares = task.predictions(logits, batch.labels, batch.extra).softmax(-1)
    assert shares.shape == (6, logits.shape[1])
    outside = torch.cat([torch.ones(3, 1), batch.extra["inside"][:, 1:]], 1).repeat_interleave(2, 0) == 0
    assert float(shares[outside].sum()) == 0.0
    ours = shares[torch.arange(6), batch.labels.reshape(-1)].log()
    assert (-ours).tolist() == pytest.approx(alone, rel=1e-5)


def test_best_span_is_that_of_trying_all() -> None:
    pick = np.random.default_rng(0)
    for _ in range(50):
        start, end = pick.normal(size=(2, 12))
        start[:3], end[:3] = -np.inf, -np.inf
        tried = {(i, j): start[i] + end[j] for i in range(3, 12) for j in range(i, min(i + 4, 12))}
        first, last, score = best_span(start, end, 4)
        assert (first, last) == max(tried, key=tried.__getitem__)
        assert score == tried[first, last]


@pytest.mark.parametrize(
    ("written", "wanted", "exact", "f1"),
    [
        ("The  Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("in Paris", ["Paris", "in the city of Paris"], 0.0, 2 / 3),  # 2 * 1 * (1/2) / (3/2) with "Paris"
        ("", [], 1.0, 1.0),
        ("Paris", [], 0.0, 0.0),
        ("", ["Paris"], 0.0, 0.0),
        ("the", [], 1.0, 1.0),  # an article is no answer
        ("Paris", ["the", "Paris"], 1.0, 1.0),
        ("", ["the", "Paris"], 0.0, 0.0),  # nor is it a right one where there is another
        ("", ["the"], 1.0, 1.0),
        ("a b c b", ["b b d"], 0.0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # "a" is an article
    ],
)
def test_scores_are_those_of_squad_2(written: str, wanted: list[str], exact: float, f1: float) -> None:
    found = squad([written, "x"], [wanted, ["x"]])
    assert found == {"exact_match": (exact + 1) / 2, "f1": pytest.approx((f1 + 1) / 2)}


def peaks(tokens: Tokens, row: int, start: int, end: int, height: float, nothing: float) -> torch.Tensor:
    """Logits of a row that quote characters [start, end) where they are in it."""
    assert tokens.places is not None
    places = tokens.places[tokens.starts[row] :][: tokens.lengths[row]]
    logits = torch.zeros(len(places), 2)
    logits[1, :] = 50.0  # a token of the question, which cannot be quoted
    logits[0, :] = nothing
    inside = places[:, 1] > 0
    logits[torch.from_numpy(inside & (places[:, 0] == start)), 0] = height
    logits[torch.from_numpy(inside & (places[:, 1] == end)), 1] = height
    return logits


def test_the_best_window_is_quoted_and_scored(tokenizer: Any) -> None:
    task = quoting()
    corpus = corpus_of(task, question("who", CONTEXT, "hi jk"), question("x", "ab cd"))
    tokens = task.encode(corpus, tokenizer, 15)
    start = CONTEXT.index("hi jk")
    # Most rows are sure that the answer is not in them; the one that holds it is not.
    logits = [
        peaks(tokens, row, start, start + 5, 4.0, 1.0 if tokens.labels[row].any() else 9.0)  # type: ignore[index]
        for row in range(len(tokens))
    ]
    found = dict(task.answers(corpus, tokens, logits, ()))
    assert found[0] == {"answer": "hi jk", "start": start, "end": start + 5, "score": 2 * 4.0 - 2 * 1.0}
    assert (found[1]["answer"], found[1]["start"], found[1]["score"]) == ("", None, -18.0)
    assert task.shown({"text": "x", **found[1]}) == "(no answer in the text)\tx"
    json.dumps(found)
    scorer = task.scorer(tokens, ())
    order = list(range(len(tokens)))
    random.Random(0).shuffle(order)
    for chosen in (order[:2], order[2:]):
        width = max(len(logits[row]) for row in chosen)
        padded = torch.stack(
            [
                torch.nn.functional.pad(logits[r], (0, 0, 0, width - len(logits[r])), value=99.0)
                for r in chosen
            ]
        )
        scorer.add(np.array(chosen), padded, torch.zeros(len(chosen), 2))
    assert scorer.scores(1.0) == {"exact_match": 1.0, "f1": 1.0}


def test_predicting_needs_no_answers() -> None:
    task = quoting(data={"columns": {"answers": "gold"}})
    corpus = task.ask([Row({"question": "q", "context": "c", "gold": "no such shape"}, "", "")], ())
    assert corpus.texts == ["q"]
    assert task.row_of("x") == {"question": "x", "context": "x"}


def test_a_model_that_sees_only_what_is_before_is_refused(tiny_causal: Path) -> None:
    config = RunConfig.model_validate({"model": {"name": str(tiny_causal), "task": "span"}})
    with pytest.raises(ModelError, match=r"sees only what stands before it.*take an encoder"):
        load_model(config, ())


def test_dropping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'data.overlong = "drop"'):
        quoting(data={"overlong": "drop"})
