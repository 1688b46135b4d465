"""Asking a finished run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedllm import checkpoint
from fedllm.errors import StoreError
from fedllm.models import Model
from fedllm.runs import Run
from strategies.registry import load_method

__all__ = ["predict", "restore"]

_NEW_TOKENS = 40


def restore(folder: Path) -> tuple[Model, Any]:
    """Return a run's model with its last global tensors in it, and its method.

    Raises:
        StoreError: the run has no checkpoint yet.
    """
    run = Run(folder)
    saved = checkpoint.latest(folder / "checkpoints")
    if saved is None:
        raise StoreError(f"{folder} has no checkpoint yet: let it finish a round first")
    method = load_method(run.config.method)(run.config)
    model = method.build(tuple(run.partition["label_names"]))
    method.load(model, saved.groups["tensors"])
    model.module.eval()
    return model, method


def predict(folder: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Classify texts (``label``, ``probabilities`` by class), or continue them (``continuation``)."""
    model, _ = restore(folder)
    encoded = model.tokenizer(
        texts,
        truncation=True,
        max_length=model.config.data.max_length,
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    if model.task == "causal":
        return [{"text": text, "continuation": _continue(model, text)} for text in texts]
    with torch.inference_mode():
        logits = model.module(**encoded).logits
    answers: list[dict[str, Any]] = []
    for text, row in zip(texts, logits.softmax(-1), strict=True):
        probabilities = dict(zip(model.labels, row.tolist(), strict=True))
        label = model.labels[int(row.argmax())]
        answers.append({"text": text, "label": label, "probabilities": probabilities})
    return answers


def _continue(model: Model, text: str) -> str:
    """Continue greedily, token by token; the tuned model's own ``generate`` may not know the adapter."""
    tokens = model.tokenizer(text, return_tensors="pt").input_ids
    start = tokens.shape[1]
    with torch.inference_mode():
        for _ in range(_NEW_TOKENS):
            logits = model.module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            following = logits[:, -1].argmax(-1, keepdim=True)
            if int(following) == model.tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, following], dim=1)
    return str(model.tokenizer.decode(tokens[0, start:], skip_special_tokens=True))
