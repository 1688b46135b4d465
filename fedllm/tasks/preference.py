"""Preferences: of two answers to a prompt one was liked better (DPO; Rafailov et al., NeurIPS 2023).

With log-probabilities log p of an answer under the model and log r under the model as it was before anybody
tuned it, an answer's reward is beta (log p - log r), and the loss of a pair is -log sigmoid of the better
answer's reward minus the worse one's (equation 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedllm.data.corpus import Example
from fedllm.data.shapes.conversations import preference
from fedllm.tasks.base import IGNORED, Scorer
from fedllm.tasks.causal import Causal
from fedllm.tasks.chat import Answered, turn_ends, with_answers
from fedllm.tasks.instruct import answered_rows, asked, learnable, prompts, written

if TYPE_CHECKING:
    import torch

    from fedllm.config import DataConfig
    from fedllm.data.corpus import Corpus
    from fedllm.data.partition import Indices
    from fedllm.data.reading import Row
    from fedllm.data.tokens import Tokens

__all__ = ["Preference"]


class _Rewards(Scorer):
    def __init__(self, task: Preference, tokens: Tokens) -> None:
        self.task, self.reference = task, tokens.aside["reference"]
        self.margins: list[float] = []

    def add(self, rows: Indices, logits: torch.Tensor, labels: torch.Tensor) -> None:
        import torch

        targets = self.task.targets(labels).to(logits.device)
        part = self.task.part(logits.flatten(0, 1).float(), targets.reshape(-1))
        known = self.reference[rows]
        reference = torch.from_numpy(np.concatenate([known[:, 0], known[:, 1]])).to(part)
        self.margins += self.task.margins([part], targets, reference).tolist()

    def scores(self, loss: float) -> dict[str, float]:
        margins = np.array(self.margins)
        return {"reward_accuracy": float((margins > 0).mean()), "reward_margin": float(margins.mean())}


class Preference(Causal):
    """Direct preference optimisation; the reference is the model as every node starts from it."""

    name: ClassVar[str] = "preference"
    metrics: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin")
    wanting: ClassVar[str] = "has two answers to choose from"
    prepares: ClassVar[bool] = True
    one_text: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected", "system")

    def read(self, row: Row, config: DataConfig, *, answered: bool = True) -> Example | None:
        """Return a row's prompt and the two answers; asked, the prompt alone."""
        if not answered:
            return asked(row, config.columns)
        found = preference(row, config.columns)
        if found is None:
            return None
        return Example("\n".join(turn["content"] for turn in found.prompt), parts=found._asdict())

    def row_of(self, text: str) -> dict[str, Any]:
        """Return a prompt."""
        return {self.config.data.columns.get("prompt", "prompt"): text}

    def encode(self, corpus: Corpus, tokenizer: Any, max_length: int) -> Tokens:
        """Write both conversations by the chat template; each is cut from the left for itself.

        Raises:
            DataError: as :meth:`fedllm.tasks.instruct.Instruct.encode`.
        """
        from fedllm.data.tokens import Choices

        if corpus.parts and isinstance(corpus.parts[0], list):
            return prompts(corpus, tokenizer, max_length)

        def side(name: str) -> Tokens:
            def write(parts: Mapping[str, Any]) -> Answered:
                turns = sum(turn["role"] == "assistant" for turn in parts[name])
                return _last(with_answers(tokenizer, [*parts["prompt"], *parts[name]]), turns)

            return answered_rows(written(corpus, write), tokenizer, max_length)

        better = side("chosen")
        columns = {field.name: getattr(better, field.name) for field in fields(better)}
        return Choices(**columns, worse=side("rejected"))

    def ends(self, tokenizer: Any) -> frozenset[int]:
        """Return the token by which the chat template ends a turn, where it has one."""
        return turn_ends(tokenizer)

    def teaching(self, tokens: Tokens) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which prompts have two answers left after what is too long was cut."""
        worse = getattr(tokens, "worse", tokens)
        return learnable(tokens) & learnable(worse)

    def prepare(self, model: Any, tokens: Tokens) -> Tokens:
        """Note the log-probability of every answer under the model as it is: ``reference``, [rows, 2]."""
        import torch

        training = model.module.training
        found = np.zeros((len(tokens), 2), dtype=np.float32)
        model.module.eval()
        try:
            with torch.inference_mode():
                for rows in model.batches(tokens, self.config.evaluation.batch_size):
                    batch = tokens.batch(rows).to(model.device)
                    logits = model.module(**batch.inputs()).logits
                    targets = self.targets(batch.labels)
                    part = self.part(logits.flatten(0, 1).float(), targets.reshape(-1))
                    found[rows] = part.reshape(targets.shape).sum(1).cpu().numpy().reshape(2, -1).T
        finally:
            model.module.train(training)
        return replace(tokens, aside={"reference": found})

    # --- learning ---------------------------------------------------------------------------------------

    def part(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of what stands at each position, 0 where nothing is predicted: [n]."""
        from torch.nn import functional

        return -functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

    def whole(
        self, parts: Sequence[torch.Tensor], targets: torch.Tensor, extra: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the mean of -log sigmoid of the margins (equation 7)."""
        from torch.nn import functional

        return -functional.logsigmoid(self.margins(parts, targets, extra["reference"])).mean()

    def margins(
        self, parts: Sequence[torch.Tensor], targets: torch.Tensor, reference: torch.Tensor
    ) -> torch.Tensor:
        """Return by how much the better answer's reward is above the worse one's: [pairs].

        Args:
            parts: log-probabilities of all positions, in order.
            targets: [2 pairs, t], the better answers first.
            reference: [2 pairs], log-probabilities under the reference.
        """
        import torch

        found = torch.cat(list(parts)).reshape(targets.shape).sum(1) - reference
        better, worse = found.chunk(2)
        return self.config.training.beta * (better - worse)

    def count(self, labels: torch.Tensor) -> int:
        """Return the number of pairs."""
        return len(labels) // 2

    def scorer(self, tokens: Tokens, names: Sequence[str]) -> Scorer:
        """Return what knows the margins."""
        return _Rewards(self, tokens)


TASKS = (Preference,)


def _last(found: Answered, turns: int) -> Answered:
    """Return a conversation with only its last so many answers marked."""
    starts = [i for i, said in enumerate(found.mask) if said and not (i and found.mask[i - 1])]
    first = starts[-turns]
    return Answered(found.ids, [said and i >= first for i, said in enumerate(found.mask)])
