"""What a run leaves: an adapter or a model that loads with peft or transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from fedllm.data.bundled import HUB
from fedllm.models import extra_adapters
from fedllm.models.anatomy import plain
from fedllm.models.base.loading import quiet
from fedllm.models.compression.masks import dense
from fedllm.models.model import Model
from fedllm.models.network import AUTO, Network

__all__ = ["describe", "save", "save_merged", "tell_lack", "unbounded"]


def save(model: Model, folder: Path) -> Path:
    """Write the result under ``folder`` and return where: ``adapter/``, or ``model/`` for a full model.

    ``adapter/`` loads with ``peft.PeftModel.from_pretrained(base, folder / "adapter")``, or with
    :func:`fedllm.models.extra_adapters.load` where it is one of ours; ``model/`` with transformers'
    ``from_pretrained``. A linear head of ours stands beside either as ``head.safetensors``; ``fedllm.json``
    says how to pool for it. Bundled base models go by their names on the hub.
    """
    backbone: Any = model.module.backbone
    adapter = model.config.tuning.peft != "full"
    place = Path(folder) / ("adapter" if adapter else "model")
    place.mkdir(parents=True, exist_ok=True)
    with quiet():
        if hasattr(backbone, "small_adapter"):
            extra_adapters.save(backbone, place)
        elif adapter:
            # peft writes what it loaded from, for a bundled model a path of this machine.
            backbone.active_peft_config.base_model_name_or_path = _base(model)
            backbone.save_pretrained(str(place), save_embedding_layers=False)
        else:
            backbone.save_pretrained(place, state_dict=dense(backbone))
            unbounded(model.tokenizer).save_pretrained(place)
    describe(model, place, model.module.head)
    return place


def save_merged(model: Model, network: Network, place: Path) -> Path:
    """Write a network without adapters into ``place``: loads as ``model/`` of :func:`save` does.

    Args:
        model: the run's, which the network says the same as.
        network: from :func:`fedllm.models.readback.read_back`, its adapter merged into the base.
        place: a new folder.
    """
    with quiet():
        network.backbone.save_pretrained(place)  # type: ignore[operator]  # a transformers model
        unbounded(model.tokenizer).save_pretrained(place)
    describe(model, place, network.head)
    return place


def describe(model: Model, place: Path, trained: nn.Linear | None, **further: str) -> None:
    """Write what transformers does not know of a result: the head, how to pool for it, the labels."""
    description = {
        "base": _base(model),
        "task": model.task.name,
        "pipeline": model.task.pipeline,
        "auto": AUTO.get(model.module.pooling, "AutoModel"),
        "pooling": model.module.pooling,
        "labels": list(model.labels),
        "max_length": model.config.data.max_length,
    }
    if model.module.pooling == "own":
        # Heads that read the last token find it by what stands behind it.
        description["padding"] = plain(model.module.backbone).config.pad_token_id
    if trained is not None:
        description["head"] = "logits = head(v / |v| * sqrt(width)), v pooled from the last hidden states"
        head = {name: p.detach().cpu().contiguous() for name, p in trained.named_parameters()}
        save_file(head, place / "head.safetensors")
    told = json.dumps(description | further, indent=2) + "\n"
    (place / "fedllm.json").write_text(told, encoding="utf-8")


def _base(model: Model) -> str:
    return HUB.get(model.config.model.name, model.config.model.name)


def unbounded(tokenizer: Any) -> Any:
    """Return a tokenizer without what its last call left in it.

    transformers sets length and padding of a call in the tokenizer itself and writes both into
    ``tokenizer.json``: whatever reads that file without transformers would cut its texts there.
    """
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def tell_lack(place: Path, lack: str) -> None:
    """Write beside a saved result what it lacks, for programs and for its model card."""
    path = place / "fedllm.json"
    description = json.loads(path.read_bytes()) | {"lacking": lack}
    path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
