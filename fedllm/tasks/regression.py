"""A number for each text, or for two texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedllm.data.columns import column, text
from fedllm.data.corpus import Example
from fedllm.errors import DataError
from fedllm.tasks.base import Distribution, Scorer, Task
from fedllm.tasks.classification import encode_texts

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.partition import Indices
    from fedllm.data.reading import Row
    from fedllm.data.tokens import Tokens

__all__ = ["Regression"]


class _Numbers(Scorer):
    def __init__(self, actual: np.ndarray[Any, Any], deviation: float) -> None:
        self.actual, self.deviation = actual, deviation
        self.predicted = np.zeros(len(actual), dtype=np.float32)

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.predicted[rows] = logits[:, 0].cpu().numpy()

    def scores(self, loss: float) -> dict[str, float]:
        import torch
        from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

        found = {"rmse": self.deviation * math.sqrt(float(np.mean((self.predicted - self.actual) ** 2)))}
        if len(self.actual) < 2 or not np.ptp(self.actual):
            return found  # nothing that predictions could go together with
        if not np.ptp(self.predicted):
            return {"pearson": 0.0, "spearman": 0.0, **found}
        pair = torch.from_numpy(self.predicted).double(), torch.from_numpy(self.actual).double()
        return {
            "pearson": float(pearson_corrcoef(*pair)),
            "spearman": float(spearman_corrcoef(*pair)),
            **found,
        }


class Regression(Task):
    """Predict ``data.label``, a number; squared error in units of its standard deviation.

    The outputs' names hold mean and deviation, which the server's texts fix for the whole federation.
    """

    name: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "rmse")
    pipeline: ClassVar[str] = "text-classification"
    classed: ClassVar[bool] = True
    pairs: ClassVar[bool] = True

    def misfit(self) -> str | None:
        """There must be a column of numbers, and a head of ours."""
        if self.config.data.label is None:
            return 'model.task = "regression" needs data.label, the column that holds the number'
        if self.pooling == "own":
            return 'model.task = "regression" needs model.pooling = "mean", "cls" or "last"'
        if self.config.data.partition in ("dirichlet", "pathological"):
            return (
                f'data.partition = "{self.config.data.partition}" needs classes, and data.label is a number; '
                '"iid" needs none'
            )
        return None

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's text, its second text where there is one, and the number."""
        found = text(row, config.text)
        second = None if config.pair is None else text(row, config.pair, "data.pair")
        if found is None or (config.pair is not None and second is None):
            return None
        value = _number(row, str(config.label)) if answered else 0.0
        return Example(found, parts={"pair": second, "value": value})

    def number(
        self, examples: Sequence[Example], names: tuple[str, ...] | None
    ) -> tuple[Indices | None, tuple[str, ...]]:
        """Name the output's mean and deviation."""
        if names is not None:
            return None, names
        values = np.array([example.parts["value"] for example in examples], dtype=np.float64)
        if not np.ptp(values):
            raise DataError(f"data.label is {values[0]:g} in every row, so there is nothing to predict")
        return None, (f"mean {float(values.mean())!r}", f"deviation {float(values.std())!r}")

    def outputs(self, names: Sequence[str]) -> int:
        """One number."""
        return 1

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Cut texts at ``max_length`` tokens; labels are the numbers, standardised.

        Raises:
            DataError: as :func:`fedllm.data.tokens.encode`.
        """
        mean, deviation = _scale(corpus.label_names)
        parts = corpus.parts or []
        values = np.array([(part["value"] - mean) / deviation for part in parts], dtype=np.float32)
        return replace(encode_texts(corpus, tokenizer, max_length), labels=values)

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean squared error."""
        from torch.nn import functional

        return functional.mse_loss(logits[:, 0], labels)

    def parametrises(self, labels: torch.Tensor) -> Distribution:
        """A number."""
        return "gaussian"

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what correlates; ``rmse`` is in the label's own unit."""
        assert tokens.labels is not None
        return _Numbers(tokens.labels, _scale(names)[1])

    def averaged(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Correlations of parts do not add up to that of the whole."""
        return {"loss": scores["loss"]}

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return number and text."""
        return f"{answer['value']:.4g}\t{answer['text']}"

    def answer(self, logits: torch.Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return ``value``, in the label's own unit."""
        mean, deviation = _scale(names)
        return [{"value": value * deviation + mean} for value in logits[:, 0].cpu().tolist()]


TASKS = (Regression,)


def _scale(names: Sequence[str]) -> tuple[float, float]:
    mean, deviation = (float(name.rpartition(" ")[2]) for name in names)
    return mean, deviation


def _number(row: Row, name: str) -> float:
    value = column(row, name, "data.label")
    try:
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not math.isfinite(found):
        raise DataError(
            f"{row.where}: column {name!r} (data.label) must hold a number, not {str(value)[:40]!r}"
        )
    return found
