"""``fedllm compress``: a smaller base model out of a larger one, by what texts show to matter."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.config import DataConfig
from fedllm.data.bundled import model_source
from fedllm.data.reading import read_rows
from fedllm.errors import ConfigError, DataError
from fedllm.models.anatomy import layers as layers_of
from fedllm.models.base.loading import quiet
from fedllm.models.compression import importance
from fedllm.models.compression.masks import n_of_m
from fedllm.models.compression.structure import keep, keep_groups, keep_neurons

__all__ = ["Wanted", "compress"]

_BATCH = 16


@dataclass(frozen=True)
class Wanted:
    """What is to be left of a model; unset leaves all.

    Attributes:
        layers: how many, the most influential ones.
        neurons: share of each feed-forward block's.
        heads: share of each layer's groups of heads.
        wanda: share of each row's weights that become zero, or ``n:m`` that stay.
    """

    layers: int | None = None
    neurons: float | None = None
    heads: float | None = None
    wanda: str | None = None


def compress(
    name: str, out: Path, wanted: Wanted, data: str, *, texts: int = 128, max_length: int = 64
) -> dict[str, Any]:
    """Write a smaller model and its tokenizer into a folder that ``model.name`` takes.

    Layers go first; what is left is measured anew before neurons, heads and weights go.

    Args:
        name: as ``model.name``.
        out: a new folder.
        wanted: what is to be left.
        data: texts that everybody may see, as ``data.name`` or ``data.path``.
        texts: how many of them.
        max_length: tokens kept of each.

    Returns:
        Layers that stayed, parameters before and after, share of zeros, seconds of a forward pass of a batch.

    Raises:
        ConfigError: nothing is wanted, or what cannot be.
        DataError: there is no text.
        ModelError: the model has no such parts.
    """
    _require(wanted)
    with quiet():
        backbone, tokenizer = _opened(name)
        batches = _batches(tokenizer, data, texts, max_length)
        told: dict[str, Any] = {
            "parameters_before": _count(backbone),
            "seconds_before": _seconds(backbone, batches),
        }
        if wanted.layers is not None:
            told["layers"] = _keep_layers(backbone, wanted.layers, name, batches)
        found = importance.measure(backbone, batches)
        if wanted.neurons is not None:
            keep_neurons(backbone, importance.neurons(found, backbone), wanted.neurons)
        if wanted.heads is not None:
            keep_groups(backbone, importance.groups(found, backbone), wanted.heads)
        if wanted.wanda is not None:
            if wanted.neurons is not None or wanted.heads is not None:
                found = importance.measure(backbone, batches)
            told["zeros"] = _zero(backbone, found, wanted.wanda)
        backbone.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return told | {"parameters": _count(backbone), "seconds": _seconds(backbone, batches)}


def _require(wanted: Wanted) -> None:
    if wanted == Wanted():
        raise ConfigError("nothing is to be compressed: give --layers, --neurons, --heads or --wanda")
    for option in ("neurons", "heads"):
        share = getattr(wanted, option)
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"--{option} is the share that stays, between 0 and 1; got {share:g}")
    _shares(wanted.wanda or "0.5")


def _shares(wanda: str) -> float | tuple[int, int]:
    """Read ``--wanda``."""
    if re.fullmatch(r"0?\.[0-9]+", wanda):
        return float(wanda)
    found = re.fullmatch(r"([1-9][0-9]*):([0-9]+)", wanda)
    if found and int(found[1]) < int(found[2]):
        return int(found[1]), int(found[2])
    raise ConfigError(f"--wanda takes the share that becomes zero, such as 0.5, or 2:4; got {wanda!r}")


def _opened(name: str) -> tuple[Any, Any]:
    """Load a model in float32: a causal one with its output matrix, any other without a head."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    source = model_source(name)
    said = AutoConfig.from_pretrained(source).architectures or [""]
    kind: Any = AutoModelForCausalLM if said[0].endswith("CausalLM") else AutoModel
    settings = {} if kind is AutoModelForCausalLM else {"add_pooling_layer": False}
    try:
        backbone = kind.from_pretrained(source, dtype=torch.float32, **settings)
    except TypeError:  # most models know no such layer
        backbone = kind.from_pretrained(source, dtype=torch.float32)
    return backbone, AutoTokenizer.from_pretrained(source)


def _batches(tokenizer: Any, data: str, count: int, longest: int) -> list[tuple[Tensor, Tensor]]:
    given = DataConfig(path=data) if Path(data).exists() else DataConfig(name=data)
    rows = itertools.islice(read_rows(given), count)
    texts = [text for row in rows if (text := str(row.columns.get(given.text) or "").strip())]
    if not texts:
        raise DataError(f"{data} has no text in the column {given.text!r}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = []
    for some in _chunks(texts):
        batch = tokenizer(some, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        found.append((batch["input_ids"], batch["attention_mask"]))
    return found


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    return (texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH))


def _keep_layers(backbone: Any, count: int, name: str, batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    depth = len(layers_of(backbone))
    if not 0 < count < depth:
        raise ConfigError(f"--layers = {count} must be from 1 to {depth - 1}: {name} has {depth} layers")
    chosen = importance.most_influential(importance.measure(backbone, batches), count)
    keep(backbone, chosen, name)
    return list(chosen)


def _zero(backbone: Any, found: importance.Measured, wanda: str) -> float:
    """Set the weakest weights of every row of the layers' matrices to zero; return their share of those."""
    wanted, zeros, total = _shares(wanda), 0, 0
    for part in layers_of(backbone).modules():
        if isinstance(part, nn.Linear):
            strength = importance.strength(found, part)
            kept = n_of_m(strength, *wanted) if isinstance(wanted, tuple) else _strongest(strength, wanted)
            part.weight.data *= kept
            zeros, total = zeros + int((~kept).sum()), total + kept.numel()
    return zeros / total


def _strongest(strength: Tensor, share: float) -> Tensor:
    """Keep the strongest of each row; a share of the row goes."""
    width = strength.shape[1]
    return n_of_m(strength, width - round(share * width), width)


def _count(backbone: nn.Module) -> int:
    return sum(p.numel() for p in backbone.parameters())


def _seconds(backbone: Any, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return the fastest of three forward passes of the first batch."""
    ids, mask = batches[0]
    backbone.eval()
    found = []
    with torch.inference_mode():
        for _ in range(3):
            began = time.perf_counter()
            backbone(input_ids=ids, attention_mask=mask)
            found.append(time.perf_counter() - began)
    return min(found)
