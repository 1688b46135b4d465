"""Every task under every method on tiny models: it trains, and what cannot be is refused in a sentence.

A new task adds rows that hold something to learn to :data:`TASKS`; a pair that cannot be, to :data:`REFUSED`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, DataError
from fedllm.runs.reader import Run
from simulations.engines.loopback import simulate as in_process
from simulations.results.predict import lines, predict
from strategies.registry import resolve_run
from tests.architectures import Architecture
from tests.conftest import CLASSES, COMMON
from tests.parts import quick
from tests.rounds.federation import run

Rows = list[dict[str, Any]]
ENCODER, DECODER, BOTH = "BertModel", "LlamaForCausalLM", "T5ForConditionalGeneration"


def _words(pick: random.Random, label: str, count: int = 3) -> str:
    words = pick.choices(CLASSES[label], k=count) + pick.choices(COMMON, k=2)
    pick.shuffle(words)
    return " ".join(words)


def _made(row: Callable[[random.Random, int], dict[str, Any]], count: int = 96) -> Rows:
    pick = random.Random(5)
    return [row(pick, number) for number in range(count)]


def _label(number: int) -> str:
    return list(CLASSES)[number % 3]


def _pairs(pick: random.Random, number: int) -> dict[str, Any]:
    other = _label(number) if number % 2 else _label(number + 1)
    return {
        "text": _words(pick, _label(number)),
        "other": _words(pick, other),
        "label": "same" if number % 2 else "different",
    }


def _several(pick: random.Random, number: int) -> dict[str, Any]:
    labels = [label for place, label in enumerate(CLASSES) if (number >> place) & 1]
    return {"text": " ".join(_words(pick, label, 2) for label in labels) or "we saw", "label": labels}


def _count(pick: random.Random, number: int) -> dict[str, Any]:
    fruits = number % 4
    return {
        "text": " ".join(["we saw", *pick.choices(CLASSES["fruit"], k=fruits), _words(pick, "metal", 1)]),
        "label": fruits,
    }


def _instruct(pick: random.Random, number: int) -> dict[str, Any]:
    return {"prompt": _words(pick, _label(number)), "response": CLASSES[_label(number)][0]}


def _seq2seq(pick: random.Random, number: int) -> dict[str, Any]:
    return {"source": _words(pick, _label(number)), "target": " ".join(CLASSES[_label(number)][:2])}


def _ranking(pick: random.Random, number: int) -> dict[str, Any]:
    kinds = [*CLASSES]
    pick.shuffle(kinds)
    return {
        "query": CLASSES[_label(number)][number % 5],
        "candidates": [_words(pick, kind) for kind in kinds],
        "clicks": [int(kind == _label(number)) for kind in kinds],
    }


def _preference(pick: random.Random, number: int) -> dict[str, Any]:
    return {
        "prompt": _words(pick, _label(number)),
        "chosen": CLASSES[_label(number)][0],
        "rejected": CLASSES[_label(number + 1)][0],
    }


def _tagged(pick: random.Random, number: int) -> dict[str, Any]:
    """Words of a class are entities of it; two that stand together are one."""
    tokens, tags = [], []
    for _ in range(4):
        label = pick.choice([*CLASSES])
        count = pick.randrange(1, 3)
        tokens += [*pick.choices(CLASSES[label], k=count), pick.choice(COMMON)]
        tags += [f"B-{label}", *[f"I-{label}"] * (count - 1), "O"]
    return {"tokens": tokens, "tags": tags}


def _marked(pick: random.Random, number: int) -> dict[str, Any]:
    tokens = _tagged(pick, number)["tokens"]
    text, spans = "", []
    for word in tokens:
        start = len(text) + 1
        text += f" {word}"
        label = next((name for name, words in CLASSES.items() if word in words), None)
        spans += [] if label is None else [{"start": start, "end": len(text), "label": label}]
    return {"text": text, "entities": spans}


def _question(pick: random.Random, number: int) -> dict[str, Any]:
    """The word of the question's class; every fourth text has none."""
    label = _label(number)
    words = pick.choices(COMMON, k=6)
    found = [] if number % 4 == 3 else [pick.choice(CLASSES[label])]
    other = pick.choice(CLASSES[_label(number + 1)])
    words[pick.randrange(6) : 0] = [*found, other]
    pick.shuffle(words)
    context = " ".join(words)
    starts = [len(" ".join(["", *words[: words.index(word)]])) for word in found]
    question = " ".join(["the", CLASSES[label][0]])
    return {"question": question, "context": context, "answers": {"text": found, "answer_start": starts}}


def _choice(pick: random.Random, number: int) -> dict[str, Any]:
    """The word of the question's class, among words of all."""
    kinds = pick.sample([*CLASSES], k=3)
    return {
        "prompt": " ".join(["the", CLASSES[_label(number)][number % 5]]),
        "choices": [" ".join(["a", pick.choice(CLASSES[kind])]) for kind in kinds],
        "answer": kinds.index(_label(number)),
    }


def _long(pick: random.Random, number: int) -> dict[str, Any]:
    return {
        "text": " ".join(_words(pick, _label(number)) for _ in range(1 + number % 3)),
        "label": _label(number),
    }


TASKS: dict[str, tuple[str, Rows, dict[str, Any]]] = {
    "pairs": (ENCODER, _made(_pairs), {"model": {"task": "classification"}, "data": {"pair": "other"}}),
    "several": (ENCODER, _made(_several), {"model": {"task": "classification"}}),
    "last": (DECODER, _made(_count), {"model": {"task": "classification", "pooling": "last"}}),
    "regression": (ENCODER, _made(_count), {"model": {"task": "regression"}}),
    "ranking": (ENCODER, _made(_ranking, 48), {"model": {"task": "ranking"}}),
    "instruct": (DECODER, _made(_instruct), {"model": {"task": "instruct"}}),
    "seq2seq": (BOTH, _made(_seq2seq), {"model": {"task": "seq2seq"}}),
    "tokens": (ENCODER, _made(_tagged), {"model": {"task": "tokens"}}),
    "tokens-last": (DECODER, _made(_marked), {"model": {"task": "tokens"}}),
    "tokens-split": (
        ENCODER,
        _made(_tagged),
        {"model": {"task": "tokens"}, "data": {"max_length": 6, "overlong": "split"}},
    ),
    "span": (ENCODER, _made(_question), {"model": {"task": "span"}}),
    "span-windows": (ENCODER, _made(_question), {"model": {"task": "span"}, "data": {"max_length": 8}}),
    "split": (
        ENCODER,
        _made(_long),
        {"model": {"task": "classification"}, "data": {"max_length": 6, "overlong": "split"}},
    ),
    "drop": (
        DECODER,
        _made(_long),
        {"model": {"task": "causal"}, "data": {"max_length": 11, "overlong": "drop"}},
    ),
    "choice": (ENCODER, _made(_choice), {"model": {"task": "choice"}}),
    "preference": (DECODER, _made(_preference), {"model": {"task": "preference"}}),
}
"""Architecture, rows and settings."""
LORA = {"tuning": {"peft": "lora", "rank": 4, "alpha": 16.0}}
FORWARD = {"tuning": {"peft": "lora", "rank": 1}, "training": {"batch_size": 32}}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg", "tuning": {"peft": "full"}, "training": {"learning_rate": 3e-3}},
    "lora": {"method": "lora", **LORA},
    "fwdllm-jvp": {"method": "fwdllm", "fwdllm": {"directions": 4, "learning_rate": 0.02}, **FORWARD},
    "fwdllm-antithetic": {
        "method": "fwdllm",
        "fwdllm": {"directions": 4, "estimator": "antithetic", "learning_rate": 0.02},
        **FORWARD,
    },
    "mezo": {
        "method": "mezo",
        "tuning": {"peft": "lora", "rank": 1},
        "training": {"batch_size": 32, "local_steps": 10, "learning_rate": 3e-3},
    },
    "fedkd": {
        "method": "fedkd",
        "tuning": {"peft": "full"},
        "fedkd": {"layers": 1},
        "training": {"learning_rate": 3e-3},
    },
}
REFUSED: dict[tuple[str, str], str] = {("preference", "fedkd"): "cannot learn model.task = .preference"}
"""What cannot be, and what is said of it."""
VARIANTS = ("tokens-last", "tokens-split", "span-windows", "split", "drop")
"""Other shapes of tasks that stand in the table; under one method each."""
CELLS = [(task, method) for task in TASKS for method in METHODS if task not in VARIANTS or method == "lora"]
QUICK = [(task, "lora") for task in ("ranking", "instruct", "span")]
ONCE_EACH = [cell for cell in CELLS if cell[1] == "lora" or cell[0] == "tokens"]
"""Every task under one method, and every method with one task."""
POOLED = [
    ("tokens", "lora"),
    ("ranking", "fedavg"),
    ("seq2seq", "fwdllm-jvp"),
    ("preference", "mezo"),
    ("span", "fedkd"),
]
"""What travels to a worker is the same for all: rows of each shape, methods of each kind."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Rows of a task as a file."""
    root = tmp_path_factory.mktemp("tasks")

    def file_of(task: str) -> Path:
        path = root / f"{task}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in TASKS[task][1]), encoding="utf-8")
        return path

    return file_of


def configured(
    task: str, method: str, architecture: Architecture, files: Callable[[str], Path], **more: Any
) -> RunConfig:
    """Return a small run of a task under a method."""
    base, _, settings = TASKS[task]
    chosen = METHODS[method]
    training = {"local_steps": 6, "batch_size": 16, "learning_rate": 2e-2, **chosen.get("training", {})}
    document = {
        "name": "tiny",
        "clients": 3,
        "rounds": 3,
        "evaluation": {"every": 1},
        **settings,
        **chosen,
        "model": {"name": str(architecture(base)), **settings["model"]},
        # What is trained on is scored, too: whether it is learnt, not whether it is general.
        "data": {
            "path": str(files(task)),
            "test_path": str(files(task)),
            "max_length": 32,
            **settings.get("data", {}),
        },
        "training": training,
        **more,
    }
    return resolve_run(document)


def losses(folder: Path) -> list[float]:
    return [record.metrics["loss"] for record in Run(folder).rounds()]


@pytest.fixture(scope="session")
def whole(
    architecture: Architecture, files: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """The folder of a finished run of a task under a method; leave it as it is."""
    root = tmp_path_factory.mktemp("whole")

    def folder_of(task: str, method: str) -> Path:
        folder = root / f"{task}-{method}"
        if not folder.exists():
            run(configured(task, method, architecture, files), folder)
        return folder

    return folder_of


@pytest.mark.parametrize(("task", "method"), quick(CELLS, *QUICK))
def test_a_task_trains_under_a_method(
    task: str,
    method: str,
    architecture: Architecture,
    files: Callable[[str], Path],
    whole: Callable[[str, str], Path],
) -> None:
    if (task, method) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[task, method]):
            configured(task, method, architecture, files)
        return
    config = configured(task, method, architecture, files)
    summary = Run(whole(task, method)).summary
    assert summary["status"] == "finished"
    found = losses(whole(task, method))
    assert min(found[1:]) < found[0], found
    measured = {name for name in summary["metrics"] if summary["metrics"][name] is not None}
    task_of_run = tasks.of(config)
    assert {name for name in task_of_run.metrics if name not in task_of_run.generated} - {"mcc"} <= measured


def outcome(folder: Path) -> dict[str, Any]:
    found = Run(folder)
    told = {key: found.summary[key] for key in ("status", "metrics", "state_sha256")}
    return told | {"rounds": [record.metrics for record in found.rounds()]}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), ONCE_EACH)
def test_a_task_that_was_cut_short_ends_in_the_same_bits(
    task: str,
    method: str,
    architecture: Architecture,
    files: Callable[[str], Path],
    whole: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    config = configured(task, method, architecture, files)
    replies = 0

    def interrupt(reply: Message) -> Message:
        nonlocal replies
        replies += 1
        if replies == 8:  # three said who they are, three ended the first round
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", interrupt)
    assert [record.round for record in Run(tmp_path / "run").rounds()] == [0, 1]
    run(config, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole(task, method))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), POOLED)
def test_workers_give_the_same_bits(
    task: str,
    method: str,
    architecture: Architecture,
    files: Callable[[str], Path],
    whole: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    in_process(configured(task, method, architecture, files), tmp_path / "pool", workers=2)
    assert outcome(tmp_path / "pool") == outcome(whole(task, method))


def test_what_cannot_be_is_refused_before_a_run(
    architecture: Architecture, files: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\.promt is no column .* did you mean prompt"):
        configured("instruct", "lora", architecture, files, data={"columns": {"promt": "a"}})
    with pytest.raises(ConfigError, match=r"data\.pair = .a. would be without effect"):
        configured("instruct", "lora", architecture, files, data={"pair": "a"})
    with pytest.raises(ConfigError, match=r"training\.beta = 0\.5 would be without effect"):
        configured("instruct", "lora", architecture, files, training={"beta": 0.5})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "measures"),
    [
        ("instruct", {"exact_match", "rouge_l"}),
        pytest.param("seq2seq", {"rouge_l", "bleu"}, marks=pytest.mark.slow),
    ],
)
def test_answers_are_generated_and_scored(
    task: str, measures: set[str], architecture: Architecture, files: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = {"every": 3, "generate": 4, "new_tokens": 4}
    config = configured(task, "lora", architecture, files, rounds=1, evaluation=asked)
    summary = run(config, tmp_path / "run")
    assert all(0 <= summary["metrics"][name] <= 100 for name in measures)


@pytest.mark.parametrize("task", quick(TASKS, *(task for task, _ in QUICK)))
def test_a_run_answers_rows_that_lack_what_is_predicted(task: str, whole: Callable[[str, str], Path]) -> None:
    folder = whole(task, "lora")
    hidden = {
        "label",
        "answer",
        "clicks",
        "response",
        "target",
        "chosen",
        "rejected",
        "tags",
        "entities",
        "answers",
    }
    rows = [{name: value for name, value in row.items() if name not in hidden} for row in TASKS[task][1][:3]]
    answers = predict(folder, rows)
    assert len(answers) == 3
    assert len(lines(folder, answers)) == 3


@pytest.mark.slow
def test_long_texts_that_a_run_leaves_out_are_not_answered(
    architecture: Architecture,
    files: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = {"overlong": "drop", "max_length": 12, "path": str(files("split"))}
    run(configured("split", "lora", architecture, files, rounds=1, data=long), tmp_path / "run")
    kept, left = "we saw one apple today", " ".join(["apple"] * 11)
    (answer,) = predict(tmp_path / "run", [left, kept])
    assert answer["text"] == kept
    assert "1 of 2 texts were longer than data.max_length = 12 tokens and were left out" in caplog.text
    with pytest.raises(DataError, match="there is no text to answer: all are longer than"):
        predict(tmp_path / "run", [left])
    train, test = [event.message for event in Run(tmp_path / "run").events() if event.kind == "data"]
    assert train.endswith("texts were longer than data.max_length = 12 tokens and were left out")
    assert test.startswith("of the test set ")
