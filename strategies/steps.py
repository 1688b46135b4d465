"""Local steps on a client's own texts, as methods with backpropagation take them: plain, or private.

    plain      batches are whole shuffled passes over the texts; g is the gradient of a batch's mean loss
    private    each of n texts is in a batch with probability B / n, by a coin of its own, and

               g = (sum over the batch's texts of g_i min(1, C / ||g_i||)  +  N(0, (z C)^2 I)) / B

(DP-SGD; Abadi et al., CCS 2016, algorithm 1), with C = ``privacy.clip`` and B = ``training.batch_size``, the
texts of a batch on average. The optimiser, weight decay and FedProx's pull see g alone. Sums are exact, as in
:mod:`strategies.private`; coins and noise come of a secret of the client's. Nothing is told of losses.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from fedllm.config import RunConfig
from fedllm.data.tokens import Tokens
from fedllm.errors import RunFailed
from fedllm.models.training import descend, minibatches, walk
from fedllm.privacy.noise import uniform
from fedllm.protocol.uplink import clipped
from fedllm.randomness import stream
from fedllm.tensors import Tensors, norm_of, spec_of
from strategies.base import Passes, StepNoise, Work
from strategies.private import PrivateSum, reach

__all__ = ["batch_rate", "take"]


def batch_rate(config: RunConfig, texts: int) -> float:
    """Return the probability with which each of so many texts is in a private batch."""
    return min(1.0, config.training.batch_size / texts)


def take(
    config: RunConfig, work: Work, parameters: Mapping[str, torch.nn.Parameter], steps: int
) -> tuple[dict[str, float], Passes]:
    """Take local steps; return what a client tells of them, and what they took.

    Args:
        config: the run; ``privacy.unit`` says whether steps are private.
        work: whose model is trained on whose texts.
        parameters: those that are trained, changed in place.
        steps: how many.

    Raises:
        RunFailed: a loss or a gradient is not finite.
    """
    training, trained = config.training, list(parameters.values())
    if config.privacy.hides == "example":
        walk(trained, _Private(config, work, parameters), range(steps), training, work.progress)
        return {}, Passes(steps, steps)
    generator = stream(config.seed, "batches", work.round, work.node)
    batches = minibatches(work.train, training.batch_size, steps, generator)
    losses = descend(trained, work.model.loss, batches, training, work.progress)
    steps = len(losses)
    return {"loss": sum(losses) / steps}, Passes(steps, steps)


class _Private:
    """Makes the gradients of private steps."""

    def __init__(self, config: RunConfig, work: Work, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        clip = config.privacy.clip
        if work.noise is None or clip is None:
            raise RuntimeError('privacy.unit = "example", and nobody gave this client\'s steps their noise')
        self._work, self._parameters, self._clip = work, parameters, clip
        self._noise: StepNoise = work.noise
        self._batch = config.training.batch_size
        self._texts = np.unique(work.train.texts())
        self._rate = batch_rate(config, len(self._texts))
        self._spec = spec_of({name: p.detach() for name, p in parameters.items()})

    def __call__(self, step: int) -> float:
        """Set the parameters' gradients to those of one step."""
        total = PrivateSum(self._spec, self._batch)
        for text in self._drawn(step):
            gradient = self._gradient(text)
            norm = norm_of(gradient)
            if not math.isfinite(norm):
                raise RunFailed("the gradient of a text is not finite; lower training.learning_rate")
            total.add(clipped(gradient, norm, self._clip), 1)
        total.blur(self._key("noise", step), self._noise.multiplier * reach(self._clip, self._spec))
        for name, value in total.mean().items():
            self._parameters[name].grad = value.to(self._parameters[name].device)
        return 0.0

    def _drawn(self, step: int) -> Iterator[Tokens]:
        """Yield the texts of a step's batch, each with all of its rows."""
        coins = uniform(self._key("batch", step), len(self._texts))
        for number in np.flatnonzero(coins < self._rate):
            yield self._work.train.of_texts(self._texts[number : number + 1])

    def _gradient(self, text: Tokens) -> Tensors:
        loss = self._work.model.loss(text.whole())
        parameters = list(self._parameters.values())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return {
            name: (torch.zeros_like(parameter) if one is None else one).to("cpu", torch.float32)
            for (name, parameter), one in zip(self._parameters.items(), found, strict=True)
        }

    def _key(self, purpose: str, step: int) -> bytes:
        return hmac.digest(self._noise.key, f"{purpose}/{step}".encode(), "sha256")
