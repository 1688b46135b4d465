"""What a federated method is: a client's half and a server's half, side by side in one file.

A round is one or more exchanges. ``plan`` asks for another exchange or commits; replies fold as they
arrive, in any order; ``step`` turns what was folded into the next global tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fedllm.config import MethodOptions, RunConfig
from fedllm.data.tokens import Batch, Tokens
from fedllm.errors import DataError, WireError
from fedllm.models.compression.masks import held
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model
from fedllm.models.saving import save
from fedllm.protocol.wire import Scalar
from fedllm.sums import WeightedSum
from fedllm.tensors import Spec, Tensors, spec_of
from strategies.tryout import require_gradients, undone

__all__ = [
    "Answer",
    "Commit",
    "Exchange",
    "Method",
    "Passes",
    "Replay",
    "Reply",
    "State",
    "Step",
    "StepNoise",
    "Work",
]


@dataclass(frozen=True)
class State:
    """The server's side of a run between two rounds; all of it is checkpointed.

    Attributes:
        version: 0 is the initial state that every node derives for itself; each commit adds one.
        tensors: global trainable tensors, as clients hold them at this version.
        memory: what the method's own half on the server needs, such as a previous gradient.
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
    """Batches that went through the whole model, forward and backward.

    Attributes:
        once: forward passes, all among ``forward``, of which a device keeps the outcome from its first answer
            that counts; told where devices are simulated, as a host's process keeps what it has room for.
    """

    forward: float = 0.0
    backward: float = 0.0
    once: float = 0.0


@dataclass(frozen=True)
class StepNoise:
    """The noise on a client's steps in one exchange, where each of its texts is hidden.

    Attributes:
        multiplier: standard deviation over the norm to which the gradient of a text is clipped.
        key: secret, 32 bytes, of which the noise and the batches come; of this exchange alone.
    """

    multiplier: float
    key: bytes


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
        noise: on each step; None where texts are not hidden so.
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
    noise: StepNoise | None = None


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
    """An answer as the server has it: decoded, and past every gate.

    Attributes:
        examples: texts that it counts for: its weight in a mean.
        claimed: texts that the client says stand behind it; above ``examples`` where a bound applies.
        norm: L2 norm of the update as it arrived.
    """

    node: int
    tensors: Tensors
    examples: int
    metrics: Mapping[str, float]
    claimed: int = 0
    norm: float = 0.0


@dataclass(frozen=True)
class Replay:
    """A step that clients can take for themselves from a short record (FwdLLM's scalars)."""

    record: bytes


@dataclass(frozen=True)
class Step:
    """What a method makes of a round.

    Attributes:
        proposal: the next global tensors, before the server optimiser; or a replay that leads to them.
        memory: what the server is to remember for the next round.
        report: numbers for people, by name; they stand in the round's record.
    """

    proposal: Tensors | Replay
    memory: Tensors
    report: Mapping[str, float] = field(default_factory=dict)


class Method(ABC):
    """One way of federated tuning; its :attr:`Options` say where it is found.

    ``acc`` is the method's own accumulator; folding the same replies in any order gives the same bits.
    The methods with a body fit a method whose global tensors are the model's own.
    """

    config: RunConfig
    """The run as the method reads it: what it decides for itself is filled in."""
    Options: ClassVar[type[MethodOptions]]
    replays: bool = False
    """Whether :meth:`step` may propose a :class:`Replay`."""
    asynchronous: bool = False
    """Whether an update means the same to global tensors that have moved on since its client began: see
    ``server.mode``. No, where a round's answers belong together or to the tensors that they began from."""
    averages: bool = False
    """Whether a round is what :func:`strategies.robust.average` makes of its updates: see ``server.robust``.
    No, where a reply is more than an update, or where products of replies are summed."""
    sums: bool = False
    """Whether folding ``fit`` replies only adds them to :meth:`summed`: see ``privacy.secure_aggregation``.
    No, where each is divided, multiplied or replayed by itself first, or where there is a setup."""
    private: bool = False
    """Whether a round shows nothing of its clients but the sum of their updates, each of them clipped, over a
    fixed number: see ``privacy.noise_multiplier``."""
    private_steps: bool = False
    """Whether clients learn from their texts by :func:`strategies.steps.take` alone: see ``privacy.unit``."""
    lacking: str = ""
    """What the global tensors lack to be a model that answers texts, as a clause; empty where it is one."""

    @abstractmethod
    def __init__(self, config: RunConfig) -> None: ...

    @abstractmethod
    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model and attach what is trained; same bits on every node for the same config."""

    @abstractmethod
    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """What the tensors of an answer must look like, given the node's view of the global ones."""

    def expected(self, exchange: Exchange, view: Tensors, node: int) -> Spec:
        """What the answer of one client must look like, given its view of the global tensors."""
        return self.spec(exchange, view)

    def gated(self, node: int) -> bool:
        """Server: whether the length of a client's answer is that of an update, and bounded as such."""
        return True

    def updates(self, tensors: Tensors) -> Spec:
        """Every tensor that an update holds in some round, given the global ones."""
        return self.spec(Exchange("fit"), tensors)

    def stands_for(self, tensors: Tensors) -> Spec:
        """The tensors that an answer moves, however it is sent: as long as these it would be uncompressed."""
        return spec_of(tensors)

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
        """Server: take in one reply past the gates; raises before it changes ``acc``, or not at all."""

    @abstractmethod
    def step(self, state: State, acc: Any) -> Step:
        """Server, on commit: turn what was folded into the next global tensors."""

    def summed(self, acc: Any) -> WeightedSum | None:
        """Server: return the sum to which folding a ``fit`` reply adds its tensors, weighted by texts.

        Returns:
            None where folding is more than that; never where :attr:`sums`.
        """
        return None

    def stride(self, tensors: Tensors) -> float | None:
        """Server: about how long a client's update is; unset where a long one does no harm by itself.

        Bounds updates before a round has shown how long they usually are; see :mod:`server.rounds.gates`.
        """
        return None

    def try_out(self, model: Model, batch: Batch) -> list[str]:
        """Server, before the first round: see that all that is trained reaches the loss; undo every step.

        Returns:
            What could not be shown, in a sentence each.

        Raises:
            ModelError: it does not.
        """
        with undone(model):
            return require_gradients(model.trainable(), lambda: model.loss(batch))

    def objective(self, model: Model) -> tuple[Callable[[Batch], torch.Tensor], tuple[nn.Module, ...]]:
        """Client: what a local step goes down, and the modules it needs beside the model; for who counts."""
        return model.loss, ()

    def evaluate(self, work: Work) -> Answer:
        """Client: score the global tensors on its own held-out texts; see :meth:`Task.told`."""
        if not len(work.test):
            raise DataError("there are no held-out texts here: set data.client_test_fraction above 0")
        batch_size = work.model.config.evaluation.batch_size
        scores = evaluate(work.model, work.test, batch_size)
        return Answer({}, len(work.test), work.model.task.told(scores))

    def score(self, model: Model, test: Tokens) -> dict[str, float]:
        """Server: score a model on its test set; called after each of many rounds with the same texts."""
        return evaluate(model, test, model.config.evaluation.batch_size)

    def initial(self, model: Model) -> Tensors:
        """Return the global tensors of version 0, which every node derives for itself."""
        return model.read()

    def begun_from(self, tensors: Tensors) -> Tensors:
        """Return what a run begins with that goes on from an earlier one's global tensors (``init_from``)."""
        return tensors

    def view(self, tensors: Tensors, node: int) -> Tensors:
        """Return what ``node`` holds of the global tensors; a function of config, node and shapes."""
        return tensors

    def load(self, model: Model, tensors: Tensors) -> None:
        """Put global tensors, or a node's view of them, into a model."""
        model.write(tensors)

    def save(self, model: Model, tensors: Tensors, folder: Path) -> Path:
        """Write the result so that it is true on the plain base model; return ``adapter/`` or ``model/``."""
        self.load(model, tensors)
        return save(model, folder)

    def reference_parameters(self, model: Model) -> int:
        """Parameters that FedAvg of the whole model would move: base and head, without adapters."""
        adapters = (".default", ".small_adapter.")  # peft's, which all have this name, and those of our own
        parameters = model.module.named_parameters()
        whole = sum(p.numel() for name, p in parameters if not any(mark in name for mark in adapters))
        return whole + held(model.module)

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        """Both sides: take a :class:`Replay` step."""
        raise WireError(f"{type(self).__name__} takes no replayed steps")
