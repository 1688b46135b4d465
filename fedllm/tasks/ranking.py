"""Which of several candidates a query wants first: recommendation and search, learnt from clicks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedllm.data.columns import column, label, text
from fedllm.data.corpus import Corpus, Example
from fedllm.data.reading import Row
from fedllm.data.shapes.answers import candidates
from fedllm.errors import DataError
from fedllm.tasks.base import Scorer, Task

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.partition import Indices
    from fedllm.data.tokens import Tokens

__all__ = ["Ranking"]


class _Ranks(Scorer):
    def __init__(self, groups: Indices, clicks: Indices) -> None:
        self.groups, self.clicks = groups, clicks
        self.values = np.zeros(len(clicks), dtype=np.float32)

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.values[rows] = (logits[:, 1] - logits[:, 0]).cpu().numpy()

    def scores(self, loss: float) -> dict[str, float]:
        """Return the means over queries; nothing where no query has candidates of both kinds."""
        import torch
        from torchmetrics.functional import retrieval

        found: list[list[float]] = []
        for group in np.unique(self.groups):
            rows = np.flatnonzero(self.groups == group)
            # torchmetrics takes what is not above 0 for not retrieved, and squashes what is above 1: places
            # in (0, 1] have the order of the values, ties included.
            places = np.unique(self.values[rows], return_inverse=True)[1] + 1
            clicks, values = torch.from_numpy(self.clicks[rows]), torch.from_numpy(places / places.max())
            if 0 < int(clicks.sum()) < len(clicks):  # all or none clicked: every order is as good
                found.append(
                    [
                        float(retrieval.retrieval_auroc(values, clicks)),
                        float(retrieval.retrieval_reciprocal_rank(values, clicks)),
                        float(retrieval.retrieval_normalized_dcg(values, clicks, top_k=5)),
                        float(retrieval.retrieval_normalized_dcg(values, clicks, top_k=10)),
                    ]
                )
        if not found:
            return {}
        return dict(zip(Ranking.metrics, map(float, np.mean(found, axis=0)), strict=True))


class Ranking(Task):
    """Tell for every candidate of a query whether it is clicked; queries are scored one by one.

    A row is a query with its candidates and clicks, or with one candidate in ``data.text`` and 0 or 1 in
    ``data.label``; rows of one query then belong together, or of one value of ``data.by``.
    """

    name: ClassVar[str] = "ranking"
    metrics: ClassVar[tuple[str, ...]] = ("auc", "mrr", "ndcg_5", "ndcg_10")
    pipeline: ClassVar[str] = "text-ranking"
    plain: ClassVar[bool] = False
    lists: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("query", "candidates", "clicks")

    def misfit(self) -> str | None:
        """The head is ours."""
        if self.pooling == "own":
            return 'model.task = "ranking" needs model.pooling = "mean", "cls" or "last"'
        return None

    @property
    def closed_form(self) -> bool:
        """Clicked and not clicked are two classes."""
        return True

    def outputs(self, names: Sequence[str]) -> int:
        """Not clicked, clicked."""
        return 2

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a query, its candidates and their clicks."""
        names = config.columns
        if names.get("candidates", "candidates") in row.columns:
            if not answered:
                listed = row.columns[names.get("candidates", "candidates")]
                clicks = [0] * len(listed) if isinstance(listed, list) else []
                row = row.supposing({names.get("clicks", "clicks"): clicks})
            found = candidates(row, names)
            if found is None:
                return None
            return Example(found.query, parts={"candidates": found.texts, "clicks": found.clicks})
        query, candidate = (
            text(row, names.get("query", "query"), "data.columns.query"),
            text(row, config.text),
        )
        if query is None or candidate is None:
            return None
        click = str(label(row, str(config.label))) if answered else "0"  # in a CSV file all is text
        if click not in ("0", "1"):
            raise DataError(
                f"{row.where}: column {config.label!r} (data.label) must hold 0 or 1, not {click!r}"
            )
        key = query if config.by is None else str(column(row, config.by, "data.by"))
        parts = {"candidates": [candidate], "clicks": [int(click)], "list": key}
        return Example(query, parts=parts, key=key)

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a query with a candidate."""
        names = self.config.data.columns
        return {names.get("query", "query"): text, names.get("candidates", "candidates"): [text]}

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Join the query with each candidate; one candidate is one row.

        Raises:
            DataError: as :func:`fedllm.data.tokens.encode_pairs`.
        """
        from fedllm.data.tokens import encode_pairs

        parts = corpus.parts or []
        sizes = [len(part["candidates"]) for part in parts]
        owners = np.repeat(np.arange(len(parts)), sizes)
        clicks = np.array([click for part in parts for click in part["clicks"]], dtype=np.int64)
        listed = [candidate for part in parts for candidate in part["candidates"]]
        flat = Corpus([corpus.texts[owner] for owner in owners], clicks, (), None)
        lists = {part["list"]: number for number, part in enumerate(parts) if "list" in part}
        groups = np.array([lists.get(part.get("list"), number) for number, part in enumerate(parts)])[owners]
        tokens = encode_pairs(flat, listed, tokenizer, max_length)
        return replace(tokens, owners=owners, aside={"group": groups})

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean cross-entropy over candidates."""
        from torch.nn import functional

        return functional.cross_entropy(logits, labels)

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what ranks each query's candidates."""
        assert tokens.labels is not None
        return _Ranks(tokens.aside["group"], tokens.labels)

    def shown(self, answer: Mapping[str, Any]) -> str:
        """Return the query, and its candidates with their scores, the best first."""
        ranked = "\n".join(f"  {one['score']:.3f}\t{one['candidate']}" for one in answer["ranked"])
        return f"{answer['text']}\n{ranked}"

    def answers(
        self, corpus: Corpus, tokens: Tokens, logits: Sequence[torch.Tensor], names: Sequence[str]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return ``ranked``: each query's candidates with the probability of a click, the best first."""
        found: list[tuple[int, dict[str, Any]]] = []
        scores = iter(logits)
        for number, part in enumerate(corpus.parts or []):
            ranked = [
                {"candidate": candidate, "score": float(next(scores).softmax(-1)[1])}
                for candidate in part["candidates"]
            ]
            ranked.sort(key=lambda one: one["score"], reverse=True)
            found.append((number, {"ranked": ranked}))
        return found


TASKS = (Ranking,)
