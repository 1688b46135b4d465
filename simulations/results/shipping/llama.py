"""A file in llama.cpp, in a network's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedllm.errors import RunFailed
from fedllm.models.anatomy import plain
from fedllm.models.model import Model
from fedllm.models.network import Network, Output
from simulations.results.shipping.gguf_files import FILE

__all__ = ["Llama"]

_ASKED = "The owl's 3 chicks, aged 12, aren't at 10°C.\n\n\tThey fly  (naïve?) at 1,250.75 m since 123456!"
"""A text with what tokenizers split each in their own way."""


class Llama(Network):
    """A model in llama.cpp, one text at a time, as many threads as torch is set to.

    Raises:
        RunFailed: its tokenizer does not read a text as the run's does.
    """

    def __init__(self, place: Path, model: Model) -> None:
        from cyllama.llama.llama_cpp import LlamaModel, LlamaModelParams, disable_logging

        super().__init__(nn.ParameterList([torch.zeros(())]), model.module.pooling)
        disable_logging()
        vocabulary = int(plain(model.module.backbone).config.vocab_size)

        class Known(LlamaModel):  # type: ignore[misc]
            """The library's own, and what it asks of its models and none of them has."""

            n_vocab = vocabulary

        self._model = Known(str(place / FILE), LlamaModelParams(), verbose=False)
        self._width = vocabulary
        asked = self._model.get_vocab().tokenize(_ASKED, True, True)
        if list(asked) != model.tokenizer(_ASKED)["input_ids"]:
            raise RunFailed(
                f"{place} would not be the run's model: llama.cpp splits texts otherwise than its tokenizer"
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **extra: torch.Tensor,
    ) -> Output:
        """Answer as :class:`Network` does; logits of padding are zero."""
        logits = torch.zeros(*input_ids.shape, self._width)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            places = mask.nonzero().flatten()
            logits[row, places] = torch.from_numpy(self._logits(ids[places].tolist()))
        loss = None if labels is None or self.task is None else self.task.loss(logits, labels, extra)
        return Output(loss, logits)

    def _logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits behind each token of one text, [tokens, vocabulary] float32."""
        from cyllama.llama.llama_cpp import LlamaBatch

        context = self._context(len(ids))
        batch = LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(token, place, [0], True)
        context.decode(batch)
        found = [np.asarray(context.get_logits_ith(place), np.float32) for place in range(len(ids))]
        return np.stack(found)

    def _context(self, length: int) -> Any:
        from cyllama.llama.llama_cpp import LlamaContext, LlamaContextParams

        asked = LlamaContextParams()
        asked.n_ctx = asked.n_batch = asked.n_ubatch = length
        asked.n_threads = asked.n_threads_batch = torch.get_num_threads()
        return LlamaContext(self._model, asked, verbose=False)
