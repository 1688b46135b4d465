"""Is what was saved the model of the run? Load it back as a user would, and compare what the two say.

Nothing of how a run builds its model is used here: a plain base from transformers, ``PeftModel`` on top,
and what ``fedllm.json`` says about the head. An adapter whose loading starts an initialisation anew, a head
that is wrapped twice, a layer whose kind depends on its place: each leaves files that look right and score
wrong.

What cannot be compared - there is no memory for a second base, a library refuses - is :class:`Unchecked`: a
reason to warn, and no reason to throw away what a run has come to.
"""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import nn

from fedllm.data.bundled import model_source
from fedllm.data.tokens import Batch
from fedllm.errors import FedllmError, RunFailed
from fedllm.models import extra_adapters
from fedllm.models.anatomy import plain
from fedllm.models.base.loading import quiet
from fedllm.models.base.quantisation import keep_layout
from fedllm.models.model import Model
from fedllm.models.network import AUTO, Network
from fedllm.wording import human_bytes

__all__ = ["Unchecked", "difference", "read_back", "require_true", "scores", "tolerance"]

_WHAT_IS_LEFT = "the run's checkpoints hold the model, and fedllm predict reads those"
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative difference of logits that the order of summation explains, by the precision of the base."""


class Unchecked(FedllmError):
    """What was saved could not be compared with the run's model: that says nothing of either.

    Attributes:
        starved: for want of memory.
    """

    def __init__(self, place: Path, reason: str, *, starved: bool = False) -> None:
        super().__init__(f"{_named(place)} was not compared with the run's model: {reason}")
        self.starved = starved


def require_true(model: Model, place: Path, batch: Batch) -> None:
    """Compare the scores of a run's model with those of the result that was saved from it.

    Takes the memory of a second base model for a moment, and does not begin where that much is not free.
    Random numbers and modes are left as they were.

    Args:
        model: holds what was saved.
        place: ``adapter/`` or ``model/``, or those of the best round.
        batch: a few texts.

    Raises:
        RunFailed: they differ by more than rounding.
        Unchecked: there is not enough memory, or what was saved cannot be loaded.
    """
    needed, free = sum(p.nbytes for p in model.module.parameters()), _free_bytes(model.device)
    if needed > free:
        said = f"a second base takes {human_bytes(needed)} of memory, and {human_bytes(free)} are free"
        raise Unchecked(place, said, starved=True)
    try:
        ours = scores(model.module, batch, model.device)
        theirs = scores(read_back(place, model), batch, model.device)
    except Exception as error:  # libraries raise whatever they meet
        if starved := _starved(error):
            raise Unchecked(place, "there was no memory for a second base", starved=starved) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Unchecked(place, f"it cannot be loaded again: {reason}; {_WHAT_IS_LEFT}") from error
    off = difference(ours, theirs)
    if not off <= tolerance(model):
        raise RunFailed(
            f"{_named(place)} is not the run's model: loaded again, its scores of {len(batch.input_ids)} "
            f"texts are {off:.1%} off; {_WHAT_IS_LEFT}"
        )


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return how far the second scores are off, relative to the norm of the first."""
    return float((ours - theirs).norm() / ours.norm().clamp(min=1e-30))


def tolerance(model: Model) -> float:
    """Return the relative difference of logits that the order of summation explains."""
    half = model.config.model.dtype == "bfloat16" or model.config.model.quantize != "none"
    return _TOLERANCE["bfloat16" if half else "float32"]


def read_back(place: Path, model: Model) -> Network:
    """Load a saved result on the plain base that ``model`` was loaded from, as a :class:`Network`."""
    import transformers

    told = json.loads((place / "fedllm.json").read_bytes())
    pooling = told["pooling"]
    kind: Any = getattr(transformers, AUTO.get(pooling, "AutoModel"))
    backbone: Any = model.module.backbone
    ours = plain(backbone).config
    packing = getattr(ours, "quantization_config", None)
    settings: dict[str, Any] = {"attn_implementation": ours._attn_implementation}
    if place.name.startswith("adapter"):
        settings["dtype"] = getattr(torch, model.config.model.dtype)
        if packing is not None:
            settings |= {"quantization_config": packing, "device_map": {"": str(model.device)}}
        if pooling == "own":
            settings |= {
                "num_labels": len(told["labels"]),
                "ignore_mismatched_sizes": True,
                "pad_token_id": told["padding"],
            }
    with torch.random.fork_rng(), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        if not place.name.startswith("adapter"):
            loaded = kind.from_pretrained(place, **settings)
        else:
            base = kind.from_pretrained(model_source(model.config.model.name), **settings)
            keep_layout(base)
            adapted = extra_adapters.load if hasattr(backbone, "small_adapter") else _with_peft
            loaded = adapted(base, place)
        head = None
        if (place / "head.safetensors").is_file():
            weights = load_file(place / "head.safetensors")
            classes, width = weights["weight"].shape
            head = nn.Linear(width, classes)
            head.load_state_dict(weights)
    network = Network(loaded, pooling, head)
    return network.to(model.device) if packing is None else network


def _with_peft(base: Any, place: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(base, str(place))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _starved(error: Exception) -> bool:
    """Whether there was too little memory; torch's allocator on the CPU has no exception of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _named(place: Path) -> str:
    return f"the result in {place.parent.name}/{place.name}"


def scores(module: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """Return the logits of the texts' own tokens, without dropout; float64 on the CPU."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            here = batch.to(device)
            logits: torch.Tensor = module(**here.inputs()).logits
            own = logits.dim() == 3 and logits.shape[1] == here.attention_mask.shape[1]
            return (logits[here.attention_mask.bool()] if own else logits).double().cpu()
    finally:
        for part, training in modes:
            part.training = training
