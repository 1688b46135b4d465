"""What a model's answers are worth: accuracy, and what accuracy hides where classes differ in size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from fedllm.data.partition import Indices
from fedllm.wording import number

__all__ = [
    "bleu",
    "by_class",
    "classified",
    "exact_match",
    "means",
    "neglect",
    "rouge_l",
    "several",
    "spread",
]

_OF_THE_WHOLE = ("macro_f1", "mcc")
"""What is no mean over texts."""
_PARTS = ("texts", "predicted", "recall", "precision", "f1")
"""What is known of each class, under ``PART/NAME``."""


def classified(actual: Indices, predicted: Indices, names: Sequence[str]) -> dict[str, float]:
    """Score predictions.

    F1 of a class is 2 hits / (texts of it + texts taken for it); macro-F1 is its plain mean over the classes
    that occur or are predicted, as scikit-learn's ``f1_score(average="macro")`` counts them.

    Args:
        actual: class numbers, [n], n >= 1.
        predicted: class numbers, [n].
        names: class names by number.

    Returns:
        ``accuracy`` and ``macro_f1`` in [0, 1], ``mcc`` (Matthews) in [-1, 1], 0 where one side is constant;
        of each class that occurs or is predicted ``texts/NAME`` and ``predicted/NAME``, how many texts are
        of it and were taken for it, and, where it occurs, ``recall/NAME`` in [0, 1].

    >>> found = classified(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0]), ["a", "b"])
    >>> found["accuracy"], round(found["macro_f1"], 4)  # (6/7 + 0) / 2
    (0.75, 0.4286)
    """
    count = len(names)
    table = np.bincount(actual * count + predicted, minlength=count * count).reshape(count, count)
    texts, taken, hits = table.sum(1), table.sum(0), table.diagonal()
    there = np.flatnonzero(texts + taken)
    # Gorodkin's R_K (2004): the correlation of two classifications, from the confusion table alone.
    total = len(actual)
    spread = math.sqrt(float(total**2 - (taken**2).sum())) * math.sqrt(float(total**2 - (texts**2).sum()))
    found = {
        "accuracy": int(hits.sum()) / len(actual),
        "mcc": float(total * hits.sum() - (taken * texts).sum()) / spread if spread else 0.0,
        "macro_f1": float((2 * hits[there] / (texts + taken)[there]).mean()),
    }
    return found | _of_classes(there, texts, taken, hits, names)


def several(
    actual: np.ndarray[Any, np.dtype[np.bool_]],
    predicted: np.ndarray[Any, np.dtype[np.bool_]],
    names: Sequence[str],
) -> dict[str, float]:
    """Score predictions of any number of classes for each text.

    Args:
        actual: which classes each text is of, [n, classes].
        predicted: which it was taken for.
        names: of the classes.

    Returns:
        As :func:`classified`, without ``mcc``; a text counts as right where all its classes are.

    >>> actual, predicted = np.array([[True, False], [True, True]]), np.array([[True, False], [True, False]])
    >>> found = several(actual, predicted, "ab")
    >>> found["accuracy"], found["macro_f1"]  # F1 is 1 for a, 0 for b
    (0.5, 0.5)
    """
    texts, taken, hits = actual.sum(0), predicted.sum(0), (actual & predicted).sum(0)
    there = np.flatnonzero(texts + taken)
    found = {
        "accuracy": float((actual == predicted).all(1).mean()),
        "macro_f1": float((2 * hits[there] / (texts + taken)[there]).mean()) if len(there) else 1.0,
    }
    return found | _of_classes(there, texts, taken, hits, names)


def _of_classes(
    there: Indices, texts: Indices, taken: Indices, hits: Indices, names: Sequence[str]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for k in there.tolist():
        found |= {f"texts/{names[k]}": float(texts[k]), f"predicted/{names[k]}": float(taken[k])}
        if texts[k]:
            found[f"recall/{names[k]}"] = int(hits[k]) / int(texts[k])
    return found


def by_class(scores: Mapping[str, float]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Take scores apart: those of the whole, and by class what a task found of it.

    >>> by_class({"loss": 0.5, "texts/a": 3.0, "recall/a": 1.0})
    ({'loss': 0.5}, {'a': {'texts': 3.0, 'recall': 1.0}})
    """
    whole: dict[str, float] = {}
    classes: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        part, slash, name = key.partition("/")
        if slash and part in _PARTS:
            classes.setdefault(name, {})[part] = value
        else:
            whole[key] = value
    return whole, classes


def means(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores that may be averaged over clients, weighted by their texts.

    A mean of macro-F1s is not the macro-F1 of all texts together, so clients do not send theirs; nor of mcc.

    >>> means({"loss": 0.5, "accuracy": 0.75, "macro_f1": 0.43, "recall/a": 1.0})
    {'loss': 0.5, 'accuracy': 0.75}
    """
    return {key: value for key, value in by_class(scores)[0].items() if key not in _OF_THE_WHOLE}


def spread(values: Sequence[float], *, higher: bool) -> dict[str, float]:
    """Say how differently clients fare, each counting once.

    As Li et al. report it: Fair Resource Allocation in Federated Learning, ICLR 2020, section 4.

    Args:
        values: of a metric, one a client; at least one.
        higher: whether more is better.

    Returns:
        ``clients``, how many; ``mean`` and ``std``, the standard deviation over these clients; the means of
        the worst and of the best tenth, rounded up to whole clients; and ``gap``, the fairness gap: by how
        much the best tenth is better than the worst, 0 or more.

    >>> spread([0.9, 0.5, 0.7], higher=True)["gap"]
    0.4
    """
    ranked = sorted(values, reverse=higher)
    tenth = math.ceil(len(ranked) / 10)
    best, worst = fmean(ranked[:tenth]), fmean(ranked[-tenth:])
    return {
        "clients": len(ranked),
        "mean": fmean(ranked),
        "std": pstdev(ranked),
        "worst_tenth": worst,
        "best_tenth": best,
        "gap": abs(best - worst),
    }


def neglect(metrics: Mapping[str, float], classes: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Say in a sentence which classes of the test set a model never predicts; nothing where it predicts all.

    Args:
        metrics: of the whole, with ``accuracy`` and ``macro_f1`` where texts have one class each.
        classes: by name, from :func:`by_class`.

    >>> classes = {"a": {"texts": 3, "predicted": 4}, "b": {"texts": 1, "predicted": 0}}
    >>> neglect({"accuracy": 0.75, "macro_f1": 0.4286}, classes)
    "the model takes every test text for 'a': accuracy 0.75 is the share of that class, macro-F1 0.4286"
    """
    missed = [name for name, one in classes.items() if one["texts"] and not one["predicted"]]
    if not missed:
        return None
    accuracy, f1 = number(metrics.get("accuracy")), number(metrics.get("macro_f1"))
    taken = [name for name, one in classes.items() if one["predicted"]]
    if len(taken) == 1 and "accuracy" in metrics:
        return (
            f"the model takes every test text for {taken[0]!r}: "
            f"accuracy {accuracy} is the share of that class, macro-F1 {f1}"
        )
    shown = ", ".join(map(repr, missed[:5])) + (f" and {len(missed) - 5} more" if len(missed) > 5 else "")
    if "accuracy" not in metrics:
        return f"the model never predicts {shown}"
    return f"the model never predicts {shown}: look at macro-F1 {f1} beside accuracy {accuracy}"


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of answers that are the wanted ones, blanks at their ends aside.

    >>> exact_match([" 42", "43"], ["42", "42"])
    0.5
    """
    hits = sum(one.strip() == other.strip() for one, other in zip(written, wanted, strict=True))
    return hits / max(len(wanted), 1)


def rouge_l(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the mean F-measure of longest common subsequences of words (Lin, 2004), in [0, 1]."""
    from torchmetrics.functional.text import rouge_score

    if not wanted:
        return 0.0
    found = rouge_score(list(written), list(wanted), rouge_keys="rougeL")
    return float(found["rougeL_fmeasure"])


def bleu(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the corpus's BLEU with sacreBLEU's tokens (Post, WMT 2018), 0 to 100."""
    from torchmetrics.functional.text import sacre_bleu_score

    if not any(one.strip() for one in written):
        return 0.0
    return 100.0 * float(sacre_bleu_score(list(written), [[one] for one in wanted]))
