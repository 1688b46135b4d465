"""Full fine-tuning, averaged: FedAvg (McMahan et al., AISTATS 2017, algorithm 1).

    client k   w_k <- local steps from w on its own texts; sends w_k - w and its number of texts n_k
    server     w  <- w + sum_k n_k (w_k - w) / sum_k n_k

The federation's reference for quality and for bytes: every parameter travels. With ``tuning.blocks`` groups
of layers take turns, see :mod:`strategies.blocks`.
"""

from __future__ import annotations

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.tensors import Tensors
from strategies.averaging import Averaging, train
from strategies.base import Answer, Exchange, Work
from strategies.blocks import turns
from strategies.fedavg.options import Options

__all__ = ["FedAvg", "Options"]


class FedAvg(Averaging):
    """Every client tunes the whole model; the server averages by numbers of texts."""

    Options = Options
    asynchronous = True
    averages = True
    sums = True
    private = True
    private_steps = True

    def __init__(self, config: RunConfig) -> None:
        if config.tuning.peft not in ("lora", "full"):  # "lora" is the section's default: not asked for
            raise ConfigError(
                f'method = "fedavg" tunes the whole model, tuning.peft = "{config.tuning.peft}" does not: '
                'use method = "lora", or tuning.peft = "full"'
            )
        self.blocks = turns(config)
        if self.blocks is not None:
            self.replays = True
            self.asynchronous = self.sums = self.private = self.private_steps = False
        full = config.tuning.model_copy(update={"peft": "full"})
        self.config = config.model_copy(update={"tuning": full})

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with every parameter trainable."""
        return models.load(self.config, labels)

    def run(self, work: Work) -> Answer:
        """Client: train on its own texts, send the update."""
        sent = self.spec(Exchange(work.kind, work.arguments), work.tensors)
        return train(self.config, work, self.config.training.local_steps, sent)

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        """Both sides: take up the new values of the group whose turn it was."""
        if self.blocks is None:
            return super().replay(tensors, record)
        return self.blocks.replay(tensors, record)
