"""What one process holds of a run: the method, one model, the tokenised texts. Loaded once, shared by all.

In a simulation the server and every virtual client work with the same frozen backbone; only the trained
tensors that are written into it differ from one client to the next.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version

import numpy as np

from fedllm import tasks
from fedllm.codecs import Codecs
from fedllm.config import RunConfig
from fedllm.data import corpus as data
from fedllm.data import digests as inputs
from fedllm.data.corpus import Corpus
from fedllm.data.tokens import Tokens
from fedllm.errors import DataError
from fedllm.models.model import Model
from fedllm.runs.records import OWN, TEXTS
from fedllm.tasks.base import Task
from fedllm.tensors import Tensors
from strategies import likeness
from strategies.base import Method
from strategies.registry import open_codecs, open_method

__all__ = ["Session", "forget_sessions", "open_session"]

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """The parts of a run, each made when first asked for.

    Attributes:
        config: the run.
        own_data: path of a device's own texts, or empty where the configuration's data are partitioned.
    """

    config: RunConfig
    own_data: str = ""

    @cached_property
    def task(self) -> Task:
        """What the model is asked to do."""
        return tasks.of(self.config)

    @cached_property
    def corpus(self) -> Corpus:
        """All texts this process may see."""
        where = self.config.data
        if self.own_data:
            where = where.model_copy(update={"path": self.own_data})
        return data.load(where, self.task, self.config.data.classes or None)

    @cached_property
    def split(self) -> tuple[Corpus, Corpus]:
        """The part that clients share out, and the server's test set."""
        if self.config.data.test_path is not None:
            return self.corpus, data.load_test(self.config.data, self.task, self.corpus)
        return data.split(self.corpus, self.config.data.test_fraction, self.config.seed)

    @cached_property
    def partition(self) -> list[np.ndarray]:
        """Each client's texts, as indices into the first part of the split."""
        where, train = self.config.data, self.split[0]
        if where.part is not None:
            client, clients = where.part
            if clients == 1:  # whatever the partition, which has as many clients as it has groups
                return [np.arange(len(train))]
            return [data.partition(train, where, clients, self.config.seed)[client]]
        return data.partition(train, where, self.config.clients, self.config.seed)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of what the run is made from; see :mod:`fedllm.data.digests`."""
        return self._texts | inputs.of_models(self.config)

    @cached_property
    def _texts(self) -> dict[str, str]:
        return inputs.of_texts(*self.split, self.partition)

    def prepare(self) -> None:
        """Load data and model now, so that what is wrong with them shows before a run begins.

        Raises:
            DataError: they cannot be read, or all texts of a client, or of the test set, were left out.
        """
        if self.own_data:
            _ = self.initial, self.train_tokens, self.notes
            return
        _ = self.partition, self.initial, self.test_tokens, self.train_tokens
        if not len(self.test_tokens):
            raise DataError(f"no text of the test set {self._short}")
        if self.config.data.overlong == "drop":
            kept = np.isin(np.arange(len(self.split[0])), self.train_tokens.texts())
            for client, part in enumerate(self.partition):
                if not kept[part].any():
                    raise DataError(f"no text of client {client} {self._short}")

    @property
    def _short(self) -> str:
        """How a text must be to be kept, as the end of "no text ..."."""
        return (
            f"is at most data.max_length = {self.config.data.max_length} tokens long: raise it, or take "
            'another data.overlong than "drop"'
        )

    @cached_property
    def notes(self) -> list[str]:
        """What was lost of the texts on their way to tokens, in a sentence each; whoever asks says them."""
        if self.own_data:
            found = self.task.notes(self.corpus, self.train_tokens)
        else:
            train, test = self.split
            found = self.task.notes(train, self.train_tokens)
            found += [f"of the test set {note}" for note in self.task.notes(test, self.test_tokens)]
        for note in found:
            logger.info("%s", note)
        return found

    @cached_property
    def method(self) -> Method:
        """The federated method."""
        return open_method(self.config)

    @cached_property
    def codecs(self) -> Codecs:
        """What encodes the run's messages, each way."""
        return open_codecs(self.config)

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
    def shared(self) -> dict[str, str]:
        """What server and clients have to have in common, as a client tells it when it introduces itself."""
        return {
            likeness.RELEASE: version("fedllm"),
            TEXTS: OWN if self.own_data else inputs.told(self._texts),
            likeness.MODEL: likeness.measure(self.method, self.model, self.initial).told(),
        }

    @cached_property
    def test_tokens(self) -> Tokens:
        """The server's test set."""
        return self.prepared(self.tokenise(self.split[1]))

    @cached_property
    def train_tokens(self) -> Tokens:
        """All texts that are trained on: those that clients share out, or a device's own."""
        return self.prepared(self.tokenise(self.corpus if self.own_data else self.split[0]))

    def prepared(self, tokens: Tokens) -> Tokens:
        """Let the task ask the model about texts as it was before anybody tuned it, and as it then stays."""
        if self.task.prepares:
            self.method.load(self.model, self.initial)
        return self.task.prepare(self.model, tokens)

    def client_tokens(self, node: int) -> tuple[Tokens, Tokens]:
        """Return the training and the held-out texts of one client."""
        tokens = self.train_tokens
        numbers = np.arange(len(tokens))
        if not self.own_data:
            if node >= len(self.partition):
                raise DataError(
                    f"client {node} has no part: the data are partitioned over {len(self.partition)} clients"
                )
            numbers = self.partition[node]
            tokens = tokens.of_texts(numbers)
        if not len(tokens):
            raise DataError(f"no text of client {node} {self._short}")
        teaching = self.task.teaching(tokens)
        if not teaching.all():
            tokens = tokens.subset(np.flatnonzero(teaching))
            numbers = numbers[teaching] if tokens.owners is None else numbers
            if not len(tokens):
                raise DataError(f"no text of client {node} {self.task.wanting}")
        own = tokens.texts()
        every = (self.corpus if self.own_data else self.split[0]).keys
        keys = None if every is None else [every[k] for k in (numbers if tokens.owners is None else own)]
        train, test = data.hold_out(own, self.config.data.client_test_fraction, self.config.seed, node, keys)
        return tokens.of_texts(train), tokens.of_texts(test)

    def tokenise(self, corpus: Corpus) -> Tokens:
        """Tokenise texts as the run does."""
        return self.model.tokenise(corpus)


def open_session(config: str, own_data: str = "") -> Session:
    """Return this process's session for a configuration given as JSON."""
    return _opened(config, own_data)


@lru_cache(maxsize=2)
def _opened(config: str, own_data: str) -> Session:
    return Session(RunConfig.from_json(config), own_data)


def forget_sessions() -> None:
    """Let this process load anew what it is asked for next."""
    _opened.cache_clear()
