"""What clients of a simulation do that attack the others: to texts before training, to updates after it.

    label_flip    class y becomes C - 1 - y                              (Tolpegin et al., ESORICS 2020)
    backdoor      every other text gets the trigger and the target class (Bagdasaryan et al., AISTATS 2020)
    sign_flip     u becomes -factor u
    scale         u becomes factor u, as of label_flip and backdoor it does too
    garbage       normal numbers, factor |u| long

Setups are answered honestly. A deployment refuses to begin such a run, and a device to take part in one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedllm.config import RunConfig
from fedllm.data.tokens import Tokens, ragged
from fedllm.errors import ConfigError
from fedllm.models.evaluation import evaluate
from fedllm.models.model import Model
from fedllm.randomness import stream
from fedllm.tensors import Tensors, norm_of

__all__ = ["attackers", "backdoor_success", "bent", "poisoned"]


def attackers(config: RunConfig) -> frozenset[int]:
    """Return the clients that attack, by number.

    >>> config = RunConfig.model_validate({"attack": {"kind": "scale", "factor": 3.0, "share": 0.3}})
    >>> len(attackers(config)), len(attackers(RunConfig()))
    (3, 0)
    """
    attack = config.attack
    if attack.kind == "none":
        return frozenset()
    order = stream(config.seed, "attackers").permutation(config.clients)
    return frozenset(order[: int(attack.share * config.clients)].tolist())


def poisoned(config: RunConfig, model: Model, train: Tokens) -> Tokens:
    """Return the texts that an attacker trains on in the place of its own.

    Raises:
        ConfigError: the attack is on classes, and the texts have none, or not as many.
    """
    kind = config.attack.kind
    if kind not in ("label_flip", "backdoor"):
        return train
    labels = _classes(config, model, train)
    if kind == "label_flip":
        return replace(train, labels=len(model.labels) - 1 - labels)
    return _triggered(config, model, train, np.arange(len(train)) % 2 == 0)


def bent(config: RunConfig, update: Tensors, *at: int) -> Tensors:
    """Return what an attacker sends in the place of its update.

    Args:
        config: the run.
        update: as it was trained.
        *at: round, index and client, which decide the draws.
    """
    attack = config.attack
    if attack.kind == "garbage":
        generator = stream(config.seed, "garbage", *at)
        drawn = {
            name: torch.from_numpy(generator.normal(size=tuple(value.shape))).to(value.dtype)
            for name, value in sorted(update.items())
        }
        return _scaled(drawn, attack.factor * norm_of(update) / norm_of(drawn))
    return _scaled(update, -attack.factor if attack.kind == "sign_flip" else attack.factor)


def backdoor_success(config: RunConfig, model: Model, test: Tokens) -> float:
    """Return the share of test texts of other classes that with the trigger are taken for the target."""
    others = np.flatnonzero(_classes(config, model, test) != config.attack.target)
    opened = _triggered(config, model, test.subset(others), np.full(len(others), True))
    return evaluate(model, opened, config.evaluation.batch_size)["accuracy"]


def _scaled(tensors: Tensors, factor: float) -> Tensors:
    return {name: value * factor for name, value in tensors.items()}


def _classes(config: RunConfig, model: Model, tokens: Tokens) -> np.ndarray[Any, Any]:
    """Return the texts' classes, or say why there are none to attack."""
    labels = tokens.labels
    if not tokens.single or labels is None or labels.ndim != 1 or labels.dtype.kind != "i":
        raise ConfigError(
            f'attack.kind = "{config.attack.kind}" is for texts of one class each: take another'
        )
    if config.attack.target >= len(model.labels):
        raise ConfigError(
            f"attack.target = {config.attack.target} is none of the {len(model.labels)} classes, from 0 on"
        )
    return labels


def _triggered(config: RunConfig, model: Model, tokens: Tokens, chosen: np.ndarray[Any, Any]) -> Tokens:
    """Put the trigger behind the first token of the chosen texts, and give them the target class."""
    trigger = model.tokenizer(config.attack.trigger, add_special_tokens=False)["input_ids"]
    rows = []
    for start, length, marked in zip(tokens.starts, tokens.lengths, chosen, strict=True):
        row = tokens.flat[start : start + length].tolist()
        if marked:
            room = config.data.max_length - len(trigger) - 2
            row = [row[0], *trigger, *row[1:-1][: max(room, 0)], row[-1]]
        rows.append(row)
    labels = np.where(chosen, config.attack.target, _classes(config, model, tokens))
    return replace(ragged(rows, labels, model.tokenizer), owners=tokens.owners)
