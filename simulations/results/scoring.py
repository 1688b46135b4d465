"""Scores of a run's model on other texts than its own test set: another run's, or those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.data import corpus as data
from fedllm.data.corpus import Corpus
from fedllm.data.digests import require_same_inputs
from fedllm.errors import ConfigError, DataError, StoreError
from fedllm.runs.reader import Run
from fedllm.runs.records import FILE
from fedllm.tasks.metrics import by_class
from simulations.results.options import Which
from simulations.results.predict import answering
from strategies.session import Session

__all__ = ["Scores", "evaluate"]


@dataclass(frozen=True)
class Scores:
    """What a model scores.

    Attributes:
        metrics: by name, as in ``summary.json``.
        classes: ``texts``, ``predicted`` and ``recall`` by class, where there are classes.
        texts: that were scored.
        trained_on: of them, that stand among the texts that the run shares out: it may have learnt them.
            None where those texts are not at hand any more.
        round: after which the model is as it is.
    """

    metrics: dict[str, float]
    classes: dict[str, dict[str, float]]
    texts: int
    trained_on: int | None
    round: int


def evaluate(folder: Path, on: Path | None = None, round: Which = None) -> Scores:
    """Score a run's model, texts read and cut as the run's own are.

    Args:
        folder: of the run.
        on: another run's folder, whose test set is taken, or a data file with the run's columns; by default
            the run's own test set.
        round: as for :func:`simulations.results.predict.restore`.

    Raises:
        ConfigError: the other run has another task, or other classes.
        DataError: the file cannot be read, has a class that the run does not know, or holds no text that is
            scored.
        StoreError: as :func:`simulations.results.predict.restore`, or the texts of either run are no longer
            those that it was begun with.
    """
    found = answering(folder, round)
    model, session = found.model, Session(found.model.config)
    corpus = _held_out(session, folder, model.labels, on)
    tokens = model.tokenise(corpus)
    if not len(tokens):
        raise DataError(f"no text of {on or folder} is left to score")
    if model.task.prepares:  # by the model as it began, which is another one in memory
        tokens = session.prepared(tokens)
    metrics, classes = by_class(found.method.score(model, tokens))
    scored = [corpus.texts[index] for index in tokens.texts()]
    return Scores(metrics, classes, len(scored), _trained_on(folder, scored), found.round)


def _trained_on(folder: Path, scored: Sequence[str]) -> int | None:
    try:
        shared_out = set(_as_begun(folder).split[0].texts)
    except (DataError, StoreError):
        return None
    return sum(text in shared_out for text in scored)


def _as_begun(folder: Path) -> Session:
    """Return a run's session, whose texts are still what they were: others would be split otherwise."""
    run = Run(folder)
    session = Session(run.config)
    require_same_inputs(folder, run.config, run.provenance.get("inputs", {}), session.inputs)
    return session


def _held_out(session: Session, folder: Path, labels: tuple[str, ...], on: Path | None) -> Corpus:
    if on is None:
        return _as_begun(folder).split[1]
    if (on / FILE).is_file():
        return _of_run(session, labels, on)
    where = session.config.data.model_copy(update={"path": str(on), "partition": "iid"})
    return data.load(where, session.task, labels or None)


def _of_run(session: Session, labels: tuple[str, ...], on: Path) -> Corpus:
    other, ours = _as_begun(on), session.config.model.task
    if (theirs := other.config.model.task) != ours:
        raise ConfigError(f'{on} is of model.task = "{theirs}", and this run of "{ours}"')
    corpus = other.split[1]
    if corpus.label_names != labels:
        names = ", ".join(corpus.label_names), ", ".join(labels)
        raise ConfigError(f"{on} tells {names[0]} apart, and this run {names[1]}")
    return corpus
