"""What one process holds of a run: the method, one model, the tokenised texts. Loaded once, shared by all.

In a simulation the server and every virtual client work with the same frozen backbone; only the trained
tensors that are written into it differ from one client to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from fedllm import data
from fedllm.config import RunConfig
from fedllm.data import Corpus, Tokens
from fedllm.errors import DataError
from fedllm.models import Model
from fedllm.tensors import Tensors
from strategies.base import Method
from strategies.registry import load_method

__all__ = ["Workshop", "open_workshop"]


@dataclass
class Workshop:
    """The parts of a run, each made when first asked for.

    Attributes:
        config: the run.
        own_data: path of a device's own texts, or empty where the configuration's data are partitioned.
    """

    config: RunConfig
    own_data: str = ""

    @cached_property
    def corpus(self) -> Corpus:
        """All texts this process may see."""
        where = self.config.data
        if self.own_data:
            where = where.model_copy(update={"path": self.own_data})
        return data.load(where, self.config.model.task, self.config.data.classes or None)

    @cached_property
    def split(self) -> tuple[Corpus, Corpus]:
        """The part that clients share out, and the server's test set."""
        return data.split(self.corpus, self.config.data.test_fraction, self.config.seed)

    @cached_property
    def partition(self) -> list[np.ndarray]:
        """Each client's texts, as indices into the first part of the split."""
        where, train = self.config.data, self.split[0]
        if where.part is not None:
            client, clients = where.part
            return [data.partition(train, where, clients, self.config.seed)[client]]
        return data.partition(train, where, self.config.clients, self.config.seed)

    def prepare(self) -> None:
        """Load data and model now, so that what is wrong with them shows before a run begins."""
        if not self.own_data:
            _ = self.partition
        _ = self.initial

    @cached_property
    def method(self) -> Method:
        """The federated method."""
        return load_method(self.config.method)(self.config)

    @cached_property
    def _built(self) -> tuple[Model, Tensors]:
        # The initial tensors are read at once, before anybody can write others into the model.
        model = self.method.build(self.corpus.label_names)
        return model, self.method.initial(model)

    @property
    def model(self) -> Model:
        """The one model of this process; whoever uses it writes tensors into it first."""
        return self._built[0]

    @property
    def initial(self) -> Tensors:
        """Global tensors of version 0."""
        return self._built[1]

    @cached_property
    def test_tokens(self) -> Tokens:
        """The server's test set."""
        return self.tokenise(self.split[1])

    @cached_property
    def _train_tokens(self) -> Tokens:
        return self.tokenise(self.corpus if self.own_data else self.split[0])

    def client_tokens(self, node: int) -> tuple[Tokens, Tokens]:
        """Return the training and the held-out texts of one client."""
        tokens = self._train_tokens
        if not self.own_data:
            if node >= len(self.partition):
                raise DataError(
                    f"client {node} has no part: the data are partitioned over {len(self.partition)} clients"
                )
            tokens = tokens.subset(self.partition[node])
        everything = np.arange(len(tokens))
        train, test = data.hold_out(everything, self.config.data.client_test_fraction, self.config.seed, node)
        return tokens.subset(train), tokens.subset(test)

    def tokenise(self, corpus: Corpus) -> Tokens:
        """Tokenise texts as the run does."""
        return data.tokenise(
            corpus, self.model.tokenizer, self.config.data.max_length, self.config.model.task
        )


@lru_cache(maxsize=2)
def open_workshop(config: str, own_data: str = "") -> Workshop:
    """Return this process's workshop for a configuration given as JSON."""
    return Workshop(RunConfig.from_json(config), own_data)
