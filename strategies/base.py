"""What a federated method is: a client's half and a server's half, side by side in one file.

A round is one or more exchanges. ``plan`` asks for another exchange or commits; replies fold as they
arrive, in any order; ``step`` turns what was folded into the next global tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fedllm.config import RunConfig, Section
from fedllm.data import Tokens
from fedllm.errors import DataError, WireError
from fedllm.models import Model, evaluate, save
from fedllm.tensors import Spec, Tensors
from fedllm.wire import Scalar

__all__ = ["Answer", "Commit", "Exchange", "Method", "Passes", "Replay", "Reply", "State", "Work"]


@dataclass(frozen=True)
class State:
    """The server's side of a run between two rounds; all of it is checkpointed.

    Attributes:
        version: commits so far; 0 is the initial state that every node derives for itself.
        tensors: global trainable tensors, as clients hold them at this version.
        memory: what only the server needs: optimiser moments, a previous gradient, residuals.
    """

    version: int
    tensors: Tensors
    memory: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """Ask the cohort (or more of it) something. ``kind`` is ``setup``, ``fit`` or ``evaluate``."""

    kind: str
    arguments: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """Enough was folded: end the round."""


@dataclass(frozen=True)
class Passes:
    """Batches that went through the whole model, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a client has in hand when it answers one exchange.

    Attributes:
        kind: the exchange's kind; ``arguments`` are the exchange's own.
        round: from 1; setup is round 0. ``index`` counts the exchanges of the round from 0.
        node: the client's number in the federation, from 0.
        progress: share of the rounds that is done, in [0, 1).
        model: holds ``tensors`` already; the method may change it freely.
        tensors: the global tensors of the version the server named.
        local: the client's own durable state, empty at first.
        train, test: the client's tokenised texts; ``test`` may be empty.
    """

    kind: str
    arguments: Mapping[str, Scalar]
    round: int
    index: int
    node: int
    progress: float
    model: Model
    tensors: Tensors
    local: Tensors
    train: Tokens
    test: Tokens


@dataclass(frozen=True)
class Answer:
    """What a client sends back (``tensors``, ``examples``, ``metrics``) and what it keeps (``local``)."""

    tensors: Tensors
    examples: int
    metrics: dict[str, float]
    local: Tensors = field(default_factory=dict)
    passes: Passes = Passes()


@dataclass(frozen=True)
class Reply:
    """An answer as the server has it: decoded, and past every gate."""

    node: int
    tensors: Tensors
    examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Replay:
    """A step that clients can take for themselves from a short record (FwdLLM's scalars)."""

    record: bytes


class Method(ABC):
    """One way of federated tuning. Its module names it ``METHOD`` and holds its ``Options``.

    ``acc`` is the method's own accumulator; folding the same replies in any order gives the same bits.
    The methods with a body fit a method whose global tensors are the model's own.
    """

    Options: ClassVar[type[Section]]
    replays: ClassVar[bool] = False
    """Whether :meth:`step` may return a :class:`Replay`."""

    @abstractmethod
    def __init__(self, config: RunConfig) -> None: ...

    @abstractmethod
    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model and attach what is trained; same bits on every node for the same config."""

    @abstractmethod
    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """What the tensors of an answer must look like, given the node's view of the global ones."""

    @abstractmethod
    def begin(self, state: State, round: int) -> Any:
        """Return an empty accumulator for a round (0 is the setup)."""

    @abstractmethod
    def plan(self, state: State, acc: Any) -> Exchange | Commit:
        """Server: ask for another exchange, or commit. Round 0 commits at once where there is no setup."""

    @abstractmethod
    def run(self, work: Work) -> Answer:
        """Client: answer one ``setup`` or ``fit`` exchange."""

    @abstractmethod
    def fold(self, acc: Any, kind: str, reply: Reply) -> Any:
        """Server: take in one accepted reply."""

    @abstractmethod
    def step(self, state: State, acc: Any) -> tuple[Tensors | Replay, Tensors]:
        """Server, on commit: the proposed global tensors (or a replay) and the next ``memory``."""

    def evaluate(self, work: Work) -> Answer:
        """Client: score the global tensors on its own held-out texts."""
        if not len(work.test):
            raise DataError("there are no held-out texts here: set data.client_test_fraction above 0")
        batch_size = work.model.config.evaluation.batch_size
        return Answer({}, len(work.test), evaluate(work.model, work.test, batch_size))

    def score(self, model: Model, test: Tokens) -> dict[str, float]:
        """Server: score a model on its test set; called after each of many rounds with the same texts."""
        return evaluate(model, test, model.config.evaluation.batch_size)

    def initial(self, model: Model) -> Tensors:
        """Return the global tensors of version 0, which every node derives for itself."""
        return model.read()

    def view(self, tensors: Tensors, node: int) -> Tensors:
        """Return what ``node`` holds of the global tensors; a function of config, node and shapes."""
        return tensors

    def load(self, model: Model, tensors: Tensors) -> None:
        """Put global tensors, or a node's view of them, into a model."""
        model.write(tensors)

    def save(self, model: Model, tensors: Tensors, folder: Path) -> None:
        """Write the result so that it is true on the plain base model: ``adapter/`` or ``model/``."""
        self.load(model, tensors)
        save(model, folder)

    def reference_parameters(self, model: Model) -> int:
        """Parameters that FedAvg of the whole model would move: base and head, without adapters."""
        adapters = ".default"  # peft names everything it adds after its adapter, "default"
        return sum(p.numel() for name, p in model.module.named_parameters() if adapters not in name)

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        """Both sides: take a :class:`Replay` step."""
        raise WireError(f"{type(self).__name__} takes no replayed steps")
