"""Server optimisers: the averaged update as a pseudo-gradient (Reddi et al., ICLR 2021, algorithm 2).

With update D_t = mean of clients' updates, learning rate e, and no bias correction, as in the paper:

    sgd        w <- w + e D
    momentum   m <- b1 m + D                     w <- w + e m
    adam       m <- b1 m + (1 - b1) D            v <- b2 v + (1 - b2) D^2
    yogi       m as adam                         v <- v - (1 - b2) D^2 sign(v - D^2)
               both:                             w <- w + e m / (sqrt(v) + epsilon)

and then, with anchor a and w0 that the run began with, w <- w + a (w0 - w): a proximal step on the squared
distance from w0, which keeps a model that is tuned on from forgetting (L2-SP; Li et al., ICML 2018).
"""

from __future__ import annotations

import torch

from fedllm.config import ServerConfig
from fedllm.errors import RunFailed
from fedllm.tensors import Tensors

__all__ = ["advance", "require_change"]

_FIRST, _SECOND, _START = "m/", "v/", "w0/"


def advance(
    config: ServerConfig, current: Tensors, proposed: Tensors, moments: Tensors
) -> tuple[Tensors, Tensors]:
    """Move from ``current`` in the direction of ``proposed``.

    Args:
        config: which optimiser, and its constants.
        current: global tensors before the round; before the first, what an anchor holds to.
        proposed: what plain averaging would make of them; same names and shapes.
        moments: of earlier rounds, empty at first.

    Returns:
        The next global tensors and the next moments.

    >>> import torch
    >>> now, then = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    >>> advance(ServerConfig(learning_rate=0.5), now, then, {})[0]["w"].tolist()
    [0.5]
    """
    if config.plain:
        return proposed, moments
    moments = dict(moments)
    advanced: Tensors = {}
    for name, value in current.items():
        update = proposed[name] - value
        if config.optimizer == "sgd":
            advanced[name] = value + config.learning_rate * update
            continue
        first = moments.get(_FIRST + name, update.new_zeros(update.shape))
        if config.optimizer == "momentum":
            moments[_FIRST + name] = first = config.momentum * first + update
            advanced[name] = value + config.learning_rate * first
            continue
        moments[_FIRST + name] = first = config.momentum * first + (1 - config.momentum) * update
        second = moments.get(_SECOND + name, update.new_zeros(update.shape))
        square = update.square()
        if config.optimizer == "adam":
            second = config.beta2 * second + (1 - config.beta2) * square
        else:
            second = second - (1 - config.beta2) * square * (second - square).sign()
        moments[_SECOND + name] = second
        advanced[name] = value + config.learning_rate * first / (second.sqrt() + config.epsilon)
    if config.anchor:
        for name, value in current.items():
            start = moments.setdefault(_START + name, value)
            advanced[name] = advanced[name] + config.anchor * (start - advanced[name])
    return advanced, moments


def require_change(before: Tensors, after: Tensors, number: int) -> None:
    """Stop a run in which nothing is learned.

    Raises:
        RunFailed: the round ``number`` leaves all tensors as they were.
    """
    if all(torch.equal(before[name], after[name]) for name in before):
        raise RunFailed(
            f"round {number} moved nothing: the updates of all its clients add up to exactly zero; the steps "
            "are too small for float32 (raise the learning rate), or what is trained does not reach the loss"
        )
