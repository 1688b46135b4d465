"""The metrics by which models are judged: which way is better, how large they get, what people call them.

Nobody else compares a metric's name. What a metric is computed from is said where it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeGuard

__all__ = ["Measure", "better", "deciding", "finite", "in_order", "judged", "leading", "measure"]

Form = Literal["share", "percent", "loss", "ratio", "number"]


@dataclass(frozen=True)
class Measure:
    """What is known of a metric.

    Attributes:
        title: as it stands within a sentence and on an axis.
        higher: whether more is better.
        form: ``share`` is at most 1, ``percent`` at most 100, ``loss`` is 0 or more in a unit of its own,
            ``ratio`` the exponential of a loss, ``number`` whatever it is.
    """

    title: str
    higher: bool = True
    form: Form = "share"

    @property
    def headline(self) -> str:
        """The title at the beginning of a line.

        >>> Measure("macro-F1").headline
        'Macro-F1'
        """
        return self.title[:1].upper() + self.title[1:]


_MEASURES = {
    "accuracy": Measure("accuracy"),
    "macro_f1": Measure("macro-F1"),
    "mcc": Measure("Matthews correlation"),
    "pearson": Measure("Pearson correlation"),
    "spearman": Measure("Spearman correlation"),
    "rmse": Measure("root mean squared error", higher=False, form="loss"),
    "f1": Measure("F1"),
    "precision": Measure("precision"),
    "recall": Measure("recall"),
    "exact_match": Measure("exact match"),
    "rouge_l": Measure("ROUGE-L"),
    "bleu": Measure("BLEU", form="percent"),
    "auc": Measure("AUC"),
    "mrr": Measure("mean reciprocal rank"),
    "ndcg_5": Measure("NDCG@5"),
    "ndcg_10": Measure("NDCG@10"),
    "reward_accuracy": Measure("reward accuracy"),
    "reward_margin": Measure("reward margin", form="number"),
    "token_accuracy": Measure("token accuracy"),
    "perplexity": Measure("perplexity", higher=False, form="ratio"),
    "loss": Measure("loss", higher=False, form="loss"),
    "backdoor_success": Measure("backdoor success", higher=False),
}
"""By name, in the order in which people look at them."""

_DECIDES = {
    "classification": "accuracy",
    "regression": "pearson",
    "tokens": "f1",
    "span": "exact_match",
    "causal": "perplexity",
    "instruct": "perplexity",
    "seq2seq": "perplexity",
    "ranking": "auc",
    "preference": "reward_accuracy",
}
"""By task, for runs that were stored before :func:`strategies.registry.resolve_keys` wrote it down."""


def deciding(task: str) -> str:
    """Return the metric that decides which round of a task is best, unless ``evaluation.metric`` does."""
    return _DECIDES.get(task, "loss")


def measure(name: str) -> Measure:
    """Return what is known of a metric; one that nobody knows goes by its name.

    >>> measure("perplexity").higher, measure("of_my_own")
    (False, Measure(title='of_my_own', higher=True, form='number'))
    """
    return _MEASURES.get(name) or Measure(name, form="number")


def in_order(names: Iterable[str], first: str = "") -> list[str]:
    """Sort metrics as people look at them: ``first`` if it is among them, the known ones, then by name.

    >>> in_order({"zeta", "loss", "accuracy", "macro_f1"}, "macro_f1")
    ['macro_f1', 'accuracy', 'loss', 'zeta']
    """
    known = list(_MEASURES)
    places = {name: place for place, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (name != first, places.get(name, len(known)), name))


def judged(names: Iterable[str], first: str) -> list[str]:
    """Return those of the names that are metrics, in order: clients report other numbers beside them.

    >>> judged(["loss", "seconds", "accuracy"], "of_my_own")
    ['accuracy', 'loss']
    """
    return [name for name in in_order(names, first) if name in _MEASURES or name == first]


def leading(names: Iterable[str], first: str) -> str:
    """Return the metric to show where there is room for one: ``first`` unless only others were measured.

    >>> leading([], "accuracy"), leading(["loss", "perplexity"], "accuracy")
    ('accuracy', 'perplexity')
    """
    return next(iter(in_order(names, first)), first)


def finite(value: float | None) -> TypeGuard[float]:
    """Whether a value is a number that can be compared; None stands for NaN and infinities.

    >>> finite(0.5), finite(None), finite(float("nan"))
    (True, False, False)
    """
    return value is not None and math.isfinite(value)


def better(name: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another; equal ones are not.

    >>> better("accuracy", 0.9, 0.8), better("perplexity", 9.0, 8.0), better("loss", 1.0, 1.0)
    (True, False, False)
    """
    return value > than if measure(name).higher else value < than
