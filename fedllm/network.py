"""One call for every kind of model: tokens in, loss and logits out.

Encoders become classifiers by pooling their tokens into one vector and adding a linear head; models that
bring a head of their own, and causal models, are called through the same signature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Network", "Output", "causal_loss"]


@dataclass
class Output:
    """What one forward pass yields.

    Attributes:
        loss: 0-dim float32 mean over texts (classification) or predicted tokens (causal), or ``None`` without
            labels.
        logits: [b, classes] float32, or [b, t, vocabulary].
        hidden_states: one [b, t, width] per layer and one for the embeddings, or ``None``.
        attentions: one [b, heads, t, t] per layer, or ``None``.
    """

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of each token given those before it.

    Args:
        logits: [b, t, vocabulary].
        labels: [b, t]; -100 is not predicted. Without any token to predict the loss is 0.

    >>> uniform = torch.zeros(1, 3, 4)
    >>> round(causal_loss(uniform, torch.tensor([[1, 2, -100]])).item(), 4)  # log 4
    1.3863
    """
    # Shifting the labels rather than the logits spares a copy of the largest tensor there is.
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    total = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum"
    )
    return total / (targets != -100).sum().clamp(min=1)


class Network(nn.Module):
    """A transformers model, with or without a peft adapter, behind one signature.

    Args:
        backbone: the model; its names start with ``backbone.`` here.
        pooling: ``mean`` or ``cls`` pools the last hidden states under ``head``; ``own`` classifies with the
            model's own head; ``causal`` predicts tokens.
        head: maps [b, width] to [b, classes]; only where pooling is ``mean`` or ``cls``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooling: Literal["mean", "cls", "own", "causal"],
        head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.head = head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Run the model.

        Args:
            input_ids: [b, t] int64.
            attention_mask: [b, t] int64, 1 where there is text.
            labels: [b] int64, or [b, t] with -100 where nothing is predicted (causal).
            output_hidden_states: also return every layer's hidden states.
            output_attentions: also return every layer's attention maps; attention is then computed eagerly,
                because the fused kernels never hold the maps.
        """
        with self._eager(output_attentions):
            raw = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                return_dict=True,
            )
        length = input_ids.shape[1]
        if self.head is None:
            logits = raw.logits[:, -length:] if self.pooling == "causal" else raw.logits.float()
        else:
            logits = self.head(self.pool(raw.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            causal = self.pooling == "causal"
            loss = causal_loss(logits, labels) if causal else functional.cross_entropy(logits, labels)
        hidden = tuple(h[:, -length:] for h in raw.hidden_states) if output_hidden_states else None
        return Output(loss, logits, hidden, tuple(raw.attentions) if output_attentions else None)

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return what the linear head sees, [b, width]; needs ``mean`` or ``cls`` pooling."""
        raw = self.backbone(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return self.pool(raw.last_hidden_state, attention_mask)

    def pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pool [b, t', width] to [b, width] float32 vectors of length sqrt(width).

        Virtual tokens that a prompt puts in front (t' > t) steer the text's tokens but are not pooled.
        The fixed length is that of sentence encoders' unit vectors, scaled so that a linear layer of the
        usual initial size starts with logits of order one.
        """
        hidden = hidden[:, -attention_mask.shape[1] :].float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return functional.normalize(pooled, dim=-1) * math.sqrt(pooled.shape[-1])

    @contextmanager
    def _eager(self, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        backbone: Any = self.backbone
        model = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(before)
