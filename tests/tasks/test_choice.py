"""Choosing among answers: rows, the token that each choice is read at, the loss, what is shown."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedllm.data.corpus import Corpus
from fedllm.data.reading import Row
from fedllm.errors import DataError
from fedllm.tasks.base import Task
from tests.parts import task_of
from tests.tasks.pieces import by_letters

CHOICES = ["ab", "c", "de f"]


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of("choice")


def row(**columns: Any) -> Row:
    return Row({"prompt": "ab cd", "choices": CHOICES, **columns}, "a.jsonl", "a.jsonl, line 1")


def asked(task: Task, *rows: Row) -> Corpus:
    return task.ask(rows, ())


@pytest.mark.parametrize("answer", [2, "C", "de f"])
def test_an_answer_is_a_number_a_letter_or_a_choice(task: Task, answer: object) -> None:
    read = task.read(row(answer=answer), task.config.data)
    assert read is not None
    assert read.parts == {"choices": CHOICES, "answer": 2}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"answer": 3}, "column 'answer' holds 3; right is a number from 0 to 2, a letter from A to C"),
        ({"answer": -1}, "holds -1"),
        ({"answer": True}, "holds True"),
        ({"answer": "D"}, "holds 'D'"),
        ({"answer": 0, "choices": ["one"]}, "column 'choices' must list two or more texts"),
        ({"answer": 0, "choices": ["one", " "]}, "none of them empty"),
        ({"answer": 0, "choices": "one, two"}, "must list two or more texts"),
        ({}, "there is no column 'answer'"),
    ],
)
def test_what_is_no_choice_is_refused(task: Task, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        task.read(row(**columns), task.config.data)


def test_each_choice_is_read_at_its_last_token_and_the_question_is_cut(task: Task) -> None:
    tokenizer = by_letters()
    corpus = asked(task, row(), row(prompt="abcdefgh"))
    tokens = task.encode(corpus, tokenizer, 14)
    assert tokens.targets is not None
    for place in (0, 1):
        begin, length = int(tokens.starts[place]), int(tokens.lengths[place])
        ids = tokens.flat[begin : begin + length].tolist()
        ends = [at for at in range(length) if tokens.targets[begin + at] != -100]
        assert [tokenizer.convert_ids_to_tokens(ids[at]) for at in ends] == ["##b", "c", "f"]
        assert length <= 14
    with pytest.raises(DataError, match="leave no room for the question"):
        task.encode(corpus, tokenizer, 9)


def test_the_loss_is_that_of_a_softmax_over_the_choices(task: Task) -> None:
    """Whatever stands at other tokens: of two choices with logits a and b the loss is log(1 + e^(b - a))."""
    labels = torch.tensor([[-100, 1, -100, 0], [0, -100, 1, -100]])
    logits = torch.tensor([[9.0, 0.5, 9.0, 1.5], [2.0, 9.0, 0.0, 9.0]])[..., None]
    wanted = (math.log1p(math.exp(1.0)) + math.log1p(math.exp(2.0))) / 2
    assert float(task.loss(logits, labels, {})) == pytest.approx(wanted, rel=1e-6)


def test_the_likeliest_choice_is_the_answer(task: Task) -> None:
    corpus = asked(task, row())
    tokens = task.encode(corpus, by_letters(), 16)
    assert tokens.targets is not None
    ends = [at for at, target in enumerate(tokens.targets) if target != -100]
    logits = torch.zeros(len(tokens.flat), 1)
    logits[ends[1]] = math.log(2.0)
    ((place, answer),) = task.answers(corpus, tokens, [logits], ())
    assert (place, answer["choice"], answer["index"]) == (0, "c", 1)
    assert answer["probabilities"] == pytest.approx([0.25, 0.5, 0.25])
    assert task.shown({**answer, "text": "ab cd"}) == "c\t0.500\tab cd"
