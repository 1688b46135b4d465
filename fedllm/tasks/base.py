"""What a task is: everything that is special about what a model is asked to do with an example.

Which columns are read, how an example becomes tokens and labels, what the model predicts from, the loss, the
metrics, and how a prediction is shown: whoever needs to know any of it asks the task, and nobody compares
names of tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fedllm.config import RunConfig, TrainingConfig
from fedllm.errors import ConfigError
from fedllm.tasks.scoring import Exercise, Scorer
from fedllm.wording import suggest

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus, Example
    from fedllm.data.partition import Indices
    from fedllm.data.reading import Row
    from fedllm.data.tokens import Overlong, Tokens

__all__ = ["IGNORED", "Distribution", "Each", "Exercise", "PerToken", "Pooling", "Scorer", "Task"]

Pooling = Literal["mean", "cls", "last", "own", "each", "causal", "seq2seq"]
"""What a prediction is made from; see :class:`fedllm.models.network.Network`."""
Distribution = Literal["categorical", "bernoulli", "gaussian"]
"""What the logits of one prediction parametrise: one of several classes, a yes or no for each, a number."""
IGNORED = -100
"""The label of a token that is not predicted."""


class Task(ABC):
    """A task; one object of it belongs to one run.

    Args:
        config: the run.

    Raises:
        ConfigError: the task cannot be with these settings; see :meth:`misfit`.

    Attributes:
        name: as ``model.task`` spells it.
        metrics: what its scorer finds besides ``loss``; the first one decides which round is best.
        pipeline: the hub's name for models of this task.
        classed: whether the model's outputs are classes that the examples name.
        chatty: whether it answers by generating text.
        prepares: whether :meth:`prepare` asks the model.
        roles: columns that it reads besides those which ``[data]`` names; ``data.columns`` renames them.
        pairs: whether it reads a second text, of the column ``data.pair``.
        generated: those of the metrics that take ``evaluation.generate``.
        alone: those that a client tells of itself, though no mean over clients is that of all texts.
        plain: whether a text alone makes an example to be answered.
        both_ways: whether its tokens must see those behind them.
        lists: whether ``data.by`` may say which rows are one example.
        one_text: whether it may read the column ``data.text``.
        wanting: what an example that teaches nothing lacks, as the end of "no text ...".
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    pipeline: ClassVar[str]
    classed: ClassVar[bool] = False
    chatty: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()
    pairs: ClassVar[bool] = False
    alone: ClassVar[tuple[str, ...]] = ()
    plain: ClassVar[bool] = True
    generated: ClassVar[tuple[str, ...]] = ()
    both_ways: ClassVar[bool] = False
    lists: ClassVar[bool] = False
    one_text: ClassVar[bool] = True
    wanting: ClassVar[str] = "has anything to predict"

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        metric, measured = config.evaluation.metric, (*self.metrics, "loss")
        if metric is not None and metric not in measured:
            raise ConfigError(
                f'evaluation.metric = {metric!r} is nothing that model.task = "{self.name}" measures'
                f"{suggest(metric, measured)}"
            )
        for role in config.data.columns:
            if role not in self.roles:
                raise ConfigError(
                    f'data.columns.{role} is no column that model.task = "{self.name}" reads'
                    + (suggest(role, self.roles) if self.roles else "")
                )
        for setting, used in (
            ("class_weights", self.weighs), ("label_smoothing", self.weighs), ("beta", self.prepares),
        ):  # fmt: skip
            given, usual = getattr(config.training, setting), TrainingConfig.model_fields[setting].default
            if given != usual and not used:
                raise ConfigError(
                    f"training.{setting} = {given!r} would be without effect: the loss of "
                    f'model.task = "{self.name}" knows none; leave it out'
                )
        if config.data.pair is not None and not self.pairs:
            raise ConfigError(
                f"data.pair = {config.data.pair!r} would be without effect: "
                f'model.task = "{self.name}" reads no second text; leave it out'
            )
        if config.data.overlong not in self.overlong:
            raise ConfigError(
                f'data.overlong = "{config.data.overlong}" is nothing that model.task = "{self.name}" does '
                f"with long texts here; it takes {' or '.join(map(repr, self.overlong))}"
            )
        if config.evaluation.generate and not self.generated:
            raise ConfigError(
                f"evaluation.generate = {config.evaluation.generate} asks for answers in words, and "
                f'model.task = "{self.name}" has none; set it to 0'
            )
        if metric in self.generated and not config.evaluation.generate:
            raise ConfigError(
                f"evaluation.metric = {metric!r} is found by generating: set evaluation.generate to the "
                "number of held-out examples to answer"
            )
        if wrong := self.misfit():
            raise ConfigError(wrong)

    # --- configuration ----------------------------------------------------------------------------------

    def misfit(self) -> str | None:
        """Say in a sentence which setting this task cannot be with; needs neither data nor torch."""
        return None

    def unread(self) -> dict[str, str]:
        """Return the keys of other sections that this task does not read, and what each is for."""
        found = {}
        if self.pooling != self.config.model.pooling:
            found["model.pooling"] = "tasks that predict something of a whole text"
        if self.config.data.partition != "natural" and not self.lists:
            found["data.by"] = 'data.partition = "natural" or model.task = "ranking"'
        if not self.one_text:
            roles = ", ".join(f"data.columns.{role}" for role in self.roles)
            found["data.text"] = f"tasks on one text, and this one's columns are named by {roles}"
        return found

    @property
    def pooling(self) -> Pooling:
        """What a prediction is made from: the setting, where texts are predicted as a whole."""
        return self.config.model.pooling

    @property
    def headed(self) -> bool:
        """Whether there is a head beside the language model's own."""
        return self.pooling not in ("causal", "seq2seq")

    @property
    def weighs(self) -> bool:
        """Whether the loss heeds ``training.class_weights`` and ``training.label_smoothing``."""
        return False

    @property
    def overlong(self) -> tuple[Overlong, ...]:
        """What it can do with texts of more than ``data.max_length`` tokens."""
        return ("truncate",)

    @property
    def closed_form(self) -> bool:
        """Whether a linear head of ours tells classes apart, which class means can initialise."""
        return False

    # --- examples ---------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return what a row holds, or nothing where there is no text in it.

        Args:
            row: of the data.
            config: what its columns are called.
            answered: whether what the model is to predict is there to be read; otherwise the model is asked,
                and :meth:`encode` puts any label in its place.

        Raises:
            DataError: a column is missing or holds something else; names file, line and what is wanted.
        """

    def row_of(self, text: str) -> dict[str, Any]:
        """Return the columns of an unanswered row made of one text; see ``plain`` for what it is good for."""
        return {self.config.data.text: text}

    def number(
        self, examples: Sequence[Example], names: tuple[str, ...] | None
    ) -> tuple[Indices | None, tuple[str, ...]]:
        """Number the classes of examples.

        Args:
            examples: all of them.
            names: the federation's classes, where they are fixed.

        Returns:
            Each example's class number, where it has exactly one; and the names of all outputs.

        Raises:
            DataError: a class is not among ``names``.
        """
        return None, ()

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of the outputs' names that are classes of a head."""
        return tuple(names)

    def outputs(self, names: Sequence[str]) -> int:
        """Return how many outputs the head has, given the names of the classes."""
        return len(self.classes(names))

    @abstractmethod
    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Turn every example into tokens and labels, once.

        Raises:
            DataError: an example cannot be; or ``max_length`` leaves no room.
        """

    def notes(self, corpus: Corpus, tokens: Tokens) -> list[str]:
        """Say what was lost of texts that became tokens, in a sentence each."""
        limit, texts = f"data.max_length = {self.config.data.max_length} tokens", len(corpus)
        if tokens.cut is not None and tokens.cut.any():
            cut = (
                int(tokens.cut.sum()) if tokens.owners is None else len(np.unique(tokens.owners[tokens.cut]))
            )
            return [f"{cut} of {texts} texts were longer than {limit} and were cut"]
        if tokens.owners is None:
            return []
        kept, rows = np.unique(tokens.owners, return_counts=True)
        if self.config.data.overlong == "drop" and len(kept) < texts:
            return [f"{texts - len(kept)} of {texts} texts were longer than {limit} and were left out"]
        if self.config.data.overlong == "split" and len(split := rows[rows > 1]):
            return [f"{len(split)} of {texts} texts were longer than {limit} and make {split.sum()} rows"]
        return []

    def teaching(self, tokens: Tokens) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which rows have something to predict: [rows] bool."""
        return np.ones(len(tokens), dtype=np.bool_)

    def prepare(self, model: Any, tokens: Tokens) -> Tokens:
        """Return the rows with whatever the loss needs of the model as it was before anybody tuned it.

        Args:
            model: a :class:`fedllm.models.model.Model` that holds the global tensors of version 0; asked only
                where ``prepares`` says so.
            tokens: rows of training or of test texts.
        """
        return tokens

    def exercises(self, tokens: Tokens, count: int) -> list[Exercise]:
        """Return up to ``count`` rows, evenly over all, as prompts to be answered by generating text."""
        raise NotImplementedError(f"{type(self).__name__} answers without generating")

    def marks(self, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """Return what generated answers are worth beside those that are wanted."""
        raise NotImplementedError(f"{type(self).__name__} answers without generating")

    # --- learning ---------------------------------------------------------------------------------------

    @abstractmethod
    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean loss of a batch, 0-dim float32.

        Args:
            logits: [b, outputs], or [b, t, outputs].
            labels: as the tokens' ``batch`` made them.
            extra: whatever else it made.
        """

    def count(self, labels: torch.Tensor) -> int:
        """Return over how many predictions :meth:`loss` averages: texts, unless a task says otherwise."""
        return len(labels)

    def predictions(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the rows of logits that are scored, as :meth:`loss` sees them: [n, outputs]."""
        return logits

    def parametrises(self, labels: torch.Tensor) -> Distribution:
        """Return what the rows of :meth:`predictions` parametrise: how two models' are compared."""
        return "categorical"

    # --- measuring and answering ------------------------------------------------------------------------

    def ends(self, tokenizer: Any) -> frozenset[int]:
        """Return the tokens that end what is generated, beside the model's own end tokens."""
        return frozenset()

    @abstractmethod
    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what scores the model on these rows; ``names`` are those of its outputs."""

    def averaged(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return the scores of one client that may be averaged over clients, weighted by their texts."""
        return {key: value for key, value in scores.items() if "/" not in key}

    def told(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return what one client tells: scores that may be averaged, and those that count for it alone."""
        return self.averaged(scores) | {name: scores[name] for name in self.alone}

    def ask(self, rows: Iterable[Row], names: tuple[str, ...]) -> Corpus:
        """Return rows without answers as examples; those with nothing to read in them are left out.

        Args:
            rows: in the order of the answers; the corpus's ``numbers`` say which ones are in it.
            names: those of the model's outputs.

        Raises:
            DataError: as :meth:`read`.
        """
        from fedllm.data.corpus import Corpus

        read = [self.read(row, self.config.data, answered=False) for row in rows]
        found = [example for example in read if example is not None]
        kept = [number for number, example in enumerate(read) if example is not None]
        return Corpus(
            [example.text for example in found],
            np.zeros(len(found), dtype=np.int64),
            names,
            None,
            np.array(kept, dtype=np.int64),
            None if all(example.parts is None for example in found) else [e.parts for e in found],
        )

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return an answer of :meth:`answer`, with its ``text``, as a line for people."""
        return "\t".join(str(value) for key, value in answer.items() if key != "text") + f"\t{answer['text']}"

    def answers(
        self, corpus: Corpus, tokens: Tokens, logits: Sequence[torch.Tensor], names: Sequence[str]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return what is shown of each text that became rows: which text, and one mapping.

        Args:
            corpus: what was asked.
            tokens: its rows.
            logits: of each row, on the CPU, without its padding.
            names: of the model's outputs.
        """
        import torch

        texts = tokens.texts_of(np.arange(len(tokens)))
        rows = [tokens.rows_of(text) for text in texts.tolist()]
        means = torch.stack([torch.stack([logits[row] for row in some]).mean(0) for some in rows])
        return list(zip(texts.tolist(), self.answer(means, names), strict=True))

    def answer(self, logits: torch.Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return what is shown of the predictions of a batch: one mapping for each row."""
        raise NotImplementedError(f"{type(self).__name__} answers by generating")


class Each(Task):
    """Puts a head of its own on each of something, whose numbers are read at one token.

    Attributes:
        each: what the head is put on.
    """

    each: ClassVar[str] = "token"

    def misfit(self) -> str | None:
        """The head is ours."""
        if self.config.model.pooling == "own":
            return (
                f'model.task = "{self.name}" puts a head of its own on every {self.each}: '
                "leave model.pooling alone"
            )
        return None

    @property
    def pooling(self) -> Pooling:
        """Every token is predicted for itself."""
        return "each"


class PerToken(Task):
    """A task that predicts a class at some of the tokens; the loss is their mean cross-entropy."""

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Return what each position's logits are scored against: [b, t], -100 where nothing is."""
        return labels

    def part(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return what some positions add to the loss: the summed cross-entropy, 0-dim.

        Args:
            logits: [n, outputs] float32.
            targets: [n], -100 where nothing is predicted.
        """
        from torch.nn import functional

        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    def whole(
        self, parts: Sequence[torch.Tensor], targets: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the loss of a batch from its parts, in the order of the positions; targets are [b, t]."""
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total / (targets != IGNORED).sum().clamp(min=1)

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean negative log-likelihood of what is predicted; 0 where nothing is."""
        targets = self.targets(labels)
        part = self.part(logits.flatten(0, 1).float(), targets.reshape(-1))
        return self.whole([part], targets, extra)

    def count(self, labels: torch.Tensor) -> int:
        """Return how many tokens are predicted."""
        return int((self.targets(labels) != IGNORED).sum())

    def predictions(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the logits at the tokens that are predicted: [n, outputs]."""
        return logits[self.targets(labels) != IGNORED]
