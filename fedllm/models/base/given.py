"""A base model from memory, written where a run finds it again as any other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from fedllm.errors import ModelError
from fedllm.models.base.loading import quiet

__all__ = ["parts", "write"]


def parts(given: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return a model from memory and its tokenizer.

    Args:
        given: a transformers model, or a function that returns one, alone or with its tokenizer.
        tokenizer: the model's own; None takes the one that the function returned, or that of the name under
            which the model was loaded.

    Raises:
        ModelError: it is no plain transformers model, or there is no tokenizer.
    """
    from transformers import PreTrainedModel

    built = given() if callable(given) and not isinstance(given, nn.Module) else given
    if isinstance(built, tuple) and len(built) == 2:
        built, tokenizer = built
    if hasattr(built, "peft_config"):
        raise ModelError(
            "the model that was given carries an adapter: merge it first, or give its base model"
        )
    if not isinstance(built, PreTrainedModel):
        raise ModelError(
            f"the model that was given is of type {type(built).__name__}, but a transformers model, or a "
            "function that returns one, is wanted"
        )
    with quiet():
        return built, _loaded_with(built) if tokenizer is None else tokenizer


def write(parts: Iterable[Any], folder: Path) -> None:
    """Save what :func:`parts` returned into a folder that ``model.name`` takes."""
    with quiet():
        for part in parts:
            part.save_pretrained(folder)


def _loaded_with(model: Any) -> Any:
    """Return the tokenizer that lies beside the weights that a model was loaded from."""
    from transformers import AutoTokenizer

    wanted = 'give it too: model={"object": model, "tokenizer": tokenizer}'
    if not model.name_or_path:
        raise ModelError(f"the model that was given comes without a tokenizer: {wanted}")
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer is found at {model.name_or_path!r}: {wanted}") from error
