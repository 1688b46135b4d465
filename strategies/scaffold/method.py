"""SCAFFOLD: local steps corrected by what all clients' gradients are (Karimireddy et al., ICML 2020).

    client k   y <- w;  K times  y <- y - e (g_k(y) - c_k + c)                     (algorithm 1, line 10)
               c_k+ <- c_k - c + (w - y) / (K e)                                   (line 12, option II)
               sends y - w, c_k+ - c_k and its number of texts n_k; keeps c_k+
    server     w <- w + sum_k p_k (y_k - w),  p_k = n_k / sum n of the cohort S
               c <- c + |S|/N sum_k p_k (c_k+ - c_k)

Clients whose texts differ pull towards optima of their own; the control variates c - c_k take that pull
out, at the price of twice FedAvg's bytes both ways. As in FedAvg clients count by their texts, where the
paper counts them alike. c travels with the global tensors, under ``control/``; c_k is the client's own state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedllm.config import RunConfig
from fedllm.data.tokens import Batch
from fedllm.errors import ConfigError
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.models.training import descend, learning_rate, minibatches
from fedllm.randomness import stream
from fedllm.tensors import Tensors
from strategies.averaging import Averaging, MeanAccumulator
from strategies.base import Answer, Passes, State, Step, Work
from strategies.scaffold.options import Options

__all__ = ["Options", "Scaffold"]

_CONTROL = "control/"


class Scaffold(Averaging):
    """Clients tune what ``tuning.peft`` says, their steps corrected by control variates."""

    Options = Options
    sums = True

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        training, server = config.training, config.server
        plain = training.optimizer == "sgd" and not (
            training.max_grad_norm or training.proximal or training.weight_decay
        )
        if not plain:
            raise ConfigError(
                'method = "scaffold" reads gradients off how far plain steps led: '
                'set training.optimizer = "sgd", and max_grad_norm, proximal and weight_decay to 0'
            )
        if not server.plain:
            raise ConfigError(
                f'method = "scaffold" moves its control variates with the weights: {server.PLAINLY}'
            )

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with what is trained."""
        return models.load(self.config, labels)

    def initial(self, model: Model) -> Tensors:
        """Return the trained tensors, and c = 0 for each."""
        tensors = model.read()
        return tensors | {_CONTROL + name: torch.zeros_like(value) for name, value in tensors.items()}

    def begun_from(self, tensors: Tensors) -> Tensors:
        """Take the weights; c begins at zero again, as the clients' c_k do, which no result holds."""
        return _weights(tensors) | {
            name: torch.zeros_like(value) for name, value in tensors.items() if name.startswith(_CONTROL)
        }

    def load(self, model: Model, tensors: Tensors) -> None:
        """Put the weights into the model; it has no place for c."""
        model.write(_weights(tensors))

    def stride(self, tensors: Tensors) -> None:
        """Server: a difference of gradients is as long as these are, which no setting tells."""

    def run(self, work: Work) -> Answer:
        """Client: take corrected steps on its own texts; send how far they led, and what became of c_k."""
        training, model = self.config.training, work.model
        parameters = model.trainable()
        control = {name: work.tensors[_CONTROL + name] for name in parameters}
        own = {name: work.local.get(name, torch.zeros_like(c)) for name, c in control.items()}
        generator = stream(self.config.seed, "batches", work.round, work.node)
        batches = minibatches(work.train, training.batch_size, training.local_steps, generator)
        loss = _corrected(model, {name: c - own[name] for name, c in control.items()})
        losses = descend(list(parameters.values()), loss, batches, training, work.progress)
        update = {name: after - work.tensors[name] for name, after in model.read().items()}
        steps = len(losses)
        distance = steps * learning_rate(training, work.progress)
        change = {name: -control[name] - moved / distance for name, moved in update.items()}
        answer = update | {_CONTROL + name: value for name, value in change.items()}
        local = {name: own[name] + value for name, value in change.items()}
        passes = Passes(steps, steps)
        return Answer(answer, len(work.train), {"loss": sum(losses) / steps}, local, passes)

    def step(self, state: State, acc: MeanAccumulator) -> Step:
        """Server: take the mean update; c moves by the cohort's share of all clients."""
        found = super().step(state, acc)
        share = acc.updates.count / self.config.clients
        assert isinstance(found.proposal, dict)
        proposal = {
            name: state.tensors[name] + share * (value - state.tensors[name])
            if name.startswith(_CONTROL)
            else value
            for name, value in found.proposal.items()
        }
        return Step(proposal, found.memory)


def _weights(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith(_CONTROL)}


def _corrected(model: Model, corrections: Tensors) -> Callable[[Batch], torch.Tensor]:
    """Return the model's loss; the corrections are added to its gradient and not to its value."""
    pairs = [(p, corrections[name].to(p)) for name, p in model.trainable().items()]

    def loss(batch: Batch) -> torch.Tensor:
        slope = torch.stack([torch.sum(p * correction) for p, correction in pairs]).sum()
        return model.loss(batch) + (slope - slope.detach())

    return loss
