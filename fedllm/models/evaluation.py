"""How good a model is on texts: its loss, its task's metrics, and what it answers in its own words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch

from fedllm.data.tokens import Tokens
from fedllm.errors import ModelError
from fedllm.models.generation import generate
from fedllm.models.model import Model

__all__ = ["Around", "evaluate"]

Around = Callable[[np.ndarray], AbstractContextManager[None]]
"""Opens something around the pass of a batch, given which of the texts are in it."""


def evaluate(
    model: Model, tokens: Tokens, batch_size: int, around: Around = lambda indices: nullcontext()
) -> dict[str, float]:
    """Score the model without dropout: ``loss``, and what the task's scorer finds.

    The loss is the mean over all that is predicted; it does not depend on ``batch_size`` beyond rounding.

    Args:
        model: as it stands.
        tokens: the texts.
        batch_size: texts at a time at most; see :meth:`fedllm.models.model.Model.batches`.
        around: opened around each batch's pass with the batch's indices, as
            :meth:`strategies.forward.activations.FeatureCache.around`, which spares the frozen layers.

    Raises:
        ModelError: there is no text, or none of which anything is predicted.
    """
    if not len(tokens):
        raise ModelError("there is no text to evaluate on")
    training = model.module.training
    model.module.eval()
    loss, count = 0.0, 0
    scorer = model.task.scorer(tokens, model.labels)
    try:
        with torch.inference_mode():
            for indices in model.batches(tokens, batch_size):
                batch = tokens.batch(indices)
                with around(indices):
                    output = model.forward(batch)
                assert output.loss is not None
                weight = model.task.count(batch.labels)
                loss += float(output.loss) * weight
                count += weight
                scorer.add(indices, output.logits, batch.labels)
    finally:
        model.module.train(training)
    if not count:
        raise ModelError(f"no text to evaluate on {model.task.wanting}")
    loss /= count
    return {"loss": loss, **scorer.scores(loss), **_exercised(model, tokens)}


def _exercised(model: Model, tokens: Tokens) -> dict[str, float]:
    """Let the model answer some of the texts in its own words, where that is asked for."""
    evaluation = model.config.evaluation
    if not evaluation.generate:
        return {}
    asked = model.task.exercises(tokens, evaluation.generate)
    prompts = [exercise.prompt for exercise in asked]
    written = generate(model, prompts, evaluation.new_tokens, ends=model.task.ends(model.tokenizer))
    read = partial(model.tokenizer.decode, skip_special_tokens=True)
    return model.task.marks([read(ids) for ids in written], [read(one.answer) for one in asked])
