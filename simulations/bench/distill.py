"""``fedllm bench distill``: a local step of FedKD beside plain fine-tuning of the same teacher."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from fedllm import tasks
from fedllm.config import RunConfig
from fedllm.data import corpus as data
from fedllm.data.tokens import Batch, Tokens
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.models.training import descend, minibatches
from fedllm.randomness import stream
from fedllm.tensors import Tensors
from strategies.base import Work
from strategies.fedkd.method import FedKD
from strategies.fedkd.student import freeze_embeddings

__all__ = ["run"]

_TEXTS = 128


def run(*, repeats: int = 3, steps: int = 10, length: int = 64) -> dict[str, Any]:
    """Time both in turns, so that a busy machine slows both.

    The teacher is MiniLM, batches are 16 x ``length`` tokens, and teacher and reference train the same
    tensors with AdamW. Seconds are of processor time on one thread: what other processes do does not count.

    Args:
        repeats: medians of so many rounds are reported.
        steps: optimiser steps per round, which begins and ends with moving the teacher's state.
        length: tokens kept of each text.

    Returns:
        For students of two and three layers, and for embedding tables trained in the teacher: seconds per
        step of fine-tuning (``plain``) and of FedKD (``fedkd``), and their ratio.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            name: _pair(embeddings, layers, repeats, steps, length)
            for name, embeddings, layers in (
                ("2 layers", "frozen", (0, 5)),
                ("3 layers", "frozen", (0, 2, 5)),
                ("3 layers, embeddings trained", "teacher", (0, 2, 5)),
            )
        }
    finally:
        torch.set_num_threads(threads)


def _pair(
    embeddings: str, layers: tuple[int, ...], repeats: int, steps: int, length: int
) -> dict[str, float]:
    config = RunConfig.model_validate(
        {
            "method": "fedkd",
            "data": {"max_length": length},
            "tuning": {"peft": "full"},
            "training": {"local_steps": steps, "learning_rate": 1e-5},
            "options": {"embeddings": embeddings, "layers": layers},
        }
    )
    method = FedKD(config)
    task = tasks.of(config)
    corpus = data.load(config.data, task).subset(range(0, 2 * _TEXTS, 2))
    student = method.build(corpus.label_names)
    tokens = task.encode(corpus, student.tokenizer, length)
    teacher = models.load(config, corpus.label_names)
    if embeddings == "frozen":
        freeze_embeddings(teacher)
    plain, ours = [], []
    local: Tensors = {}
    initial = method.initial(student)
    for number in range(1, repeats + 2):
        start = time.process_time()
        _fine_tune(teacher, tokens, number)
        turn = time.process_time()
        work = Work("fit", {}, number, 0, 0, 0.0, student, initial, local, tokens, tokens)
        local = method.run(work).local
        plain.append(turn - start)
        ours.append(time.process_time() - turn)
    plain_s, ours_s = (statistics.median(times[1:]) / steps for times in (plain, ours))  # the first warms up
    return {"plain": plain_s, "fedkd": ours_s, "ratio": ours_s / plain_s}


def _fine_tune(teacher: Model, tokens: Tokens, number: int) -> None:
    training = teacher.config.training

    def loss(batch: Batch) -> torch.Tensor:
        value = teacher.loss(batch)
        assert value is not None
        return value

    batches = minibatches(tokens, training.batch_size, training.local_steps, stream(0, "batches", number, 0))
    descend(list(teacher.trainable().values()), loss, batches, training)
