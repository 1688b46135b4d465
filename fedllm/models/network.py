"""One call for every kind of model: tokens in, loss and logits out.

Encoders become classifiers by pooling their tokens into one vector and adding a linear head; models that
bring a head of their own, and causal models, are called through the same signature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fedllm.models.anatomy import plain
from fedllm.tasks.base import Pooling, Task

__all__ = ["AUTO", "PEFT", "Network", "Output"]

AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "own": "AutoModelForSequenceClassification",
}
"""The Auto class of transformers for each pooling; ``AutoModel`` for the others, under a head of ours."""
PEFT = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "own": "SEQ_CLS"}
"""What peft calls them; ``FEATURE_EXTRACTION`` the others."""
_INPUTS = ("token_type_ids", "position_ids", "decoder_input_ids", "decoder_attention_mask")
"""What of a batch's extra tensors the model takes; the others are the loss's."""


@dataclass
class Output:
    """What one forward pass yields.

    Attributes:
        loss: 0-dim float32, the task's, or ``None`` without labels.
        logits: [b, outputs] float32, or [b, t, outputs].
        hidden_states: one [b, t, width] per layer and one for the embeddings, or ``None``.
        attentions: one [b, heads, t, t] per layer, or ``None``.
    """

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Network(nn.Module):
    """A transformers model, with or without a peft adapter, behind one signature.

    Args:
        backbone: the model; its names start with ``backbone.`` here.
        pooling: ``mean``, ``cls`` (the first token) or ``last`` pools the last hidden states under ``head``;
            ``each`` puts the head on every token; ``own`` classifies with the model's own head; ``causal``
            predicts following tokens, ``seq2seq`` those of an answer.
        head: maps [..., width] to [..., outputs]; only where it is ours.
        task: knows the loss; needed where labels are given.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooling: Pooling,
        head: nn.Linear | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.head = head
        self.task = task

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **extra: torch.Tensor,
    ) -> Output:
        """Run the model.

        Args:
            input_ids: [b, t] int64.
            attention_mask: [b, t] int64, 1 where there is text.
            labels: what the task's loss compares with.
            output_hidden_states: also return every layer's hidden states.
            output_attentions: also return every layer's attention maps; attention is then computed eagerly,
                because the fused kernels never hold the maps.
            **extra: further inputs of the model, and of the loss.
        """
        inputs = {name: extra[name] for name in _INPUTS if name in extra}
        if "answer_ids" in extra:  # a decoder reads its answer one place to the right
            inputs["decoder_input_ids"] = plain(self.backbone).prepare_decoder_input_ids_from_labels(
                extra["answer_ids"]
            )
        with self._eager(output_attentions):
            raw = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                return_dict=True,
                **inputs,
            )
        length = input_ids.shape[1]
        if self.head is not None:
            logits = self.head(self.pool(raw.last_hidden_state, attention_mask))
        elif self.pooling == "own":
            logits = raw.logits.float()
        else:
            logits = raw.logits[:, -length:] if self.pooling == "causal" else raw.logits
        loss = None
        if labels is not None:
            assert self.task is not None
            loss = self.task.loss(logits, labels, extra)
        side = "encoder_" if self.pooling == "seq2seq" else ""  # what reads the text, where two do the work
        states = getattr(raw, f"{side}hidden_states") if output_hidden_states else ()
        maps = getattr(raw, f"{side}attentions") if output_attentions else ()
        hidden = tuple(state[:, -length:] for state in states)
        return Output(loss, logits, hidden or None, tuple(maps) or None)

    def features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **extra: torch.Tensor
    ) -> torch.Tensor:
        """Return what the linear head sees, [b, width]; needs a head of ours."""
        inputs = {name: extra[name] for name in _INPUTS if name in extra}
        raw = self.backbone(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs)
        return self.pool(raw.last_hidden_state, attention_mask)

    def pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pool [b, t', width] to [b, width], or [b, t, width] for ``each``: float32, of length sqrt(width).

        Virtual tokens that a prompt puts in front (t' > t) steer the text's tokens but are not pooled.
        The fixed length is that of sentence encoders' unit vectors, scaled so that a linear layer of the
        usual initial size starts with logits of order one.
        """
        hidden = hidden[:, -attention_mask.shape[1] :].float()
        if self.pooling == "each":
            pooled = hidden
        elif self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "last":
            pooled = hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]
        else:
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        return functional.normalize(pooled, dim=-1) * math.sqrt(pooled.shape[-1])

    @contextmanager
    def _eager(self, wanted: bool) -> Iterator[None]:
        if not wanted:
            yield
            return
        model = plain(self.backbone)
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(before)
