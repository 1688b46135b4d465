"""A teacher of four layers, and a plain loop around the method that stands in for the engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.config import RunConfig
from fedllm.data import corpus as data
from fedllm.data.tokens import Tokens
from fedllm.models.model import Model
from fedllm.tensors import Tensors
from strategies.base import Answer, Work
from strategies.fedkd.method import FedKD
from tests.parts import task_of


@pytest.fixture(scope="session")
def deep_encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of four layers x 32 and two heads: a teacher with something to leave out."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("deep")
    shutil.copytree(tiny_encoder, folder, dirs_exist_ok=True)
    settings = BertConfig.from_pretrained(tiny_encoder, num_hidden_layers=4, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        BertModel(settings).save_pretrained(folder)
    return folder


@dataclass
class Client:
    """One process of the federation: a method with its student, and every client's texts."""

    config: RunConfig
    method: FedKD
    student: Model
    texts: list[Tokens]
    initial: Tensors

    def fit(
        self, node: int = 0, local: Tensors | None = None, tensors: Tensors | None = None, round: int = 1
    ) -> Answer:
        return self._ask("fit", node, local or {}, self.initial if tensors is None else tensors, round)

    def evaluate(self, node: int = 0, local: Tensors | None = None, tensors: Tensors | None = None) -> Answer:
        return self._ask("evaluate", node, local or {}, self.initial if tensors is None else tensors, 1)

    def _ask(self, kind: str, node: int, local: Tensors, tensors: Tensors, round: int) -> Answer:
        self.student.write(tensors)
        train, test = self.texts[node].subset(range(24)), self.texts[node].subset(range(24, 60))
        progress = (round - 1) / self.config.rounds
        # Copies, since a method must not change what it was handed.
        held = {name: value.clone() for name, value in local.items()}
        work = Work(kind, {}, round, 0, node, progress, self.student, tensors, held, train, test)
        answer = self.method.evaluate(work) if kind == "evaluate" else self.method.run(work)
        assert all(torch.equal(held[name], local[name]) for name in local)
        return answer


Start = Callable[..., Client]


@pytest.fixture
def start(deep_encoder: Path, tiny_causal: Path, tiny_texts: Path) -> Start:
    """Return a function that starts a fresh process; keywords are the method's options."""

    def _start(
        *,
        causal: bool = False,
        tuning: str = "full",
        training: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Client:
        config = RunConfig.model_validate(
            {
                "method": "fedkd",
                "clients": 4,
                "rounds": 4,
                "model": {
                    "name": str(tiny_causal if causal else deep_encoder),
                    "task": "causal" if causal else "classification",
                },
                "data": {"path": str(tiny_texts), "max_length": 16},
                "tuning": {"peft": tuning, "rank": 2},
                "training": {"local_steps": 3, "batch_size": 8, "learning_rate": 1e-3, **(training or {})},
                "options": {"layers": 1 if causal else 2, **options},
            }
        )
        method = FedKD(config)
        corpus = data.load(config.data, task_of(config.model.task))
        student = method.build(corpus.label_names)
        tokens = task_of(config.model.task).encode(corpus, student.tokenizer, 16)
        parts = data.partition(corpus, config.data, config.clients, 0)
        return Client(
            config, method, student, [tokens.subset(part) for part in parts], method.initial(student)
        )

    return _start
