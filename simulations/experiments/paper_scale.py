"""What cells at a paper's own scale need, reckoned from the shapes of their models before anything starts.

The models stand in their files as sizes, and are made without weights; nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.presets import Cost
from simulations.experiments.definition import Architecture, Experiment, Hardware

__all__ = ["Need", "needs", "reckoned", "stand_in"]


@dataclass(frozen=True)
class Need:
    """What one run needs, evaluation aside.

    Attributes:
        memory: bytes on the accelerator: model, gradients, optimiser, activations of the largest batch.
        seconds: of computing, clients one after the other.
        moved: bytes between server and clients, both ways, if the federation were a real one.
        disk: bytes of the run's last checkpoints.
    """

    memory: float
    seconds: float
    moved: float
    disk: float


def reckoned(experiment: Experiment) -> Callable[[RunConfig], Cost]:
    """Return what tells the cost of a run of an experiment that says its hardware."""
    need = needs(experiment)

    def cost(config: RunConfig) -> Cost:
        found = need(config)
        return Cost(found.seconds, found.memory, found.disk)

    return cost


def needs(experiment: Experiment) -> Callable[[RunConfig], Need]:
    """Return what tells the needs of a run; seeds share an answer.

    Raises:
        ConfigError: the experiment says no hardware; later, a model that it does not describe.
    """
    hardware = experiment.hardware
    if hardware is None:
        raise ConfigError(
            "an experiment without hardware says what its cells take: there is nothing to reckon"
        )

    @functools.cache
    def of(text: str) -> Need:
        config = RunConfig.from_json(text)
        architecture = experiment.models.get(config.model.name)
        if architecture is None:
            raise ConfigError(
                f"models describes no {config.model.name}, of which a cell wants to know the shapes"
            )
        with tempfile.TemporaryDirectory() as folder:
            stand_in(architecture, Path(folder))
            return _need(config, Path(folder), hardware)

    return lambda config: of(config.model_copy(update={"seed": 0, "name": "any"}).to_json())


def _need(config: RunConfig, folder: Path, hardware: Hardware) -> Need:
    from simulations.planner import Limits, estimate

    rate = 1e12 * hardware.tflops * hardware.efficiency
    local = config.model_copy(update={"model": config.model.model_copy(update={"name": str(folder)})})
    found = estimate("", local, Limits(None, None, lambda operations: operations / rate, 0))
    answers = config.rounds * config.answers
    state = found.up if config.codec.up == "none" else found.down
    return Need(found.total, answers * found.round, answers * (found.up + found.down), 2 * state)


def stand_in(architecture: Architecture, folder: Path) -> int:
    """Write a model's configuration, and a tokenizer of a few words, as if it had been downloaded.

    Returns:
        Its parameters.

    Raises:
        ConfigError: the sizes make another model than the file says, or none.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.for_model(architecture.kind, **architecture.sizes)
    except ValueError as error:
        raise ConfigError(f"kind = {architecture.kind!r} is none that transformers knows") from error
    with torch.device("meta"):
        model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]  # as in all of transformers
    count: int = sum(p.numel() for p in model.parameters())
    if abs(count / 1e6 / architecture.million - 1) > 0.01:
        raise ConfigError(
            f"a {architecture.kind} of these sizes has {count / 1e6:.1f} million parameters, "
            f"not {architecture.million:g}"
        )
    config.save_pretrained(folder)
    _write_tokenizer(config.pad_token_id or 0, folder)
    return count


def _write_tokenizer(pad: int, folder: Path) -> None:
    """Write a tokenizer of a few words, whose padding has this number."""
    from transformers import PreTrainedTokenizerFast

    words = ["[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"word{number}" for number in range(pad + 1))]
    words.insert(pad, "[PAD]")
    model = {"type": "WordLevel", "vocab": {word: place for place, word in enumerate(words)}}
    file = folder / "tokenizer.json"
    whole = {"model": model | {"unk_token": "[UNK]"}, "pre_tokenizer": {"type": "Whitespace"}}
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], **whole}), encoding="utf-8")
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    names = {f"{name}_token": word for name, word in (special | {"bos": "[CLS]", "eos": "[SEP]"}).items()}
    made = PreTrainedTokenizerFast(tokenizer_file=str(file), **names)  # type: ignore[no-untyped-call]  # as above
    made.save_pretrained(folder)
