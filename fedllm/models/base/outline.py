"""What a base model's configuration says of it, without its weights."""

from __future__ import annotations

from typing import Any

import torch

from fedllm.config import RunConfig
from fedllm.data.bundled import model_source
from fedllm.data.starting_point import Base
from fedllm.errors import ModelError
from fedllm.models.base.loading import open_tokenizer, quiet
from fedllm.models.base.soundness import one_line, positions

__all__ = ["outline"]


def outline(config: RunConfig) -> tuple[Any, Base]:
    """Return the tokenizer of a run's base model, and how long and how wide the model is.

    Raises:
        ModelError: it cannot be found or read.
    """
    import transformers

    build: Any = transformers.AutoModel
    with quiet():
        source = model_source(config.model.name)
        tokenizer = open_tokenizer(source, config)
        try:
            settings = transformers.AutoConfig.from_pretrained(source)
            with torch.device("meta"):  # its shapes alone: nothing is computed and nothing kept
                model = build.from_config(settings)
        except Exception as error:  # its readers raise whatever they meet
            raise ModelError(
                f"model.name = {config.model.name!r} has no configuration that transformers can read: "
                f"{one_line(error)}"
            ) from error
    width = getattr(settings, "hidden_size", None)
    return tokenizer, Base(positions(model), width if isinstance(width, int) and width > 0 else None)
