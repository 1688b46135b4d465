"""What answers cost in floating-point operations, and what a device must hold: both counted, not measured.

A token costs two operations for each weight of a matrix that it meets, and as many again in a backward pass;
a matrix that is trained costs two more there, for its own gradient (Kaplan et al., "Scaling laws for neural
language models", 2020, section 2.1: 2 N forward, 4 N backward where all is trained). A backward pass
counts as one through the whole model, also where only its upper layers are trained. Left out are padding and
attention's products of tokens with tokens, some per cent for texts of a hundred tokens. All experts of
a mixture count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fedllm.data.tokens import Tokens
from fedllm.devices import Named, assigned
from fedllm.errors import ConfigError
from fedllm.protocol.wire import Reply
from fedllm.wording import human_bytes
from server.rounds.timing.clock import Clock
from strategies.base import Method
from strategies.registry import method_options
from strategies.session import Session

__all__ = ["Work", "clock_of", "entries", "least_memory", "multiplied", "per_token", "require_memory"]


class Work:
    """Counts the operations behind the replies of a run's clients.

    Attributes:
        forward, backward: operations per token of a pass through the whole model.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        model = session.model
        self.forward, self.backward = per_token(
            model.module, elsewhere=_elsewhere(session), recomputes=model.config.training.recomputes
        )
        self._tokens = lru_cache(maxsize=None)(self._count)

    def flops(self, node: int, kind: str, reply: Reply) -> float:
        """Return the operations behind a reply: its passes; in an evaluation all held-out texts, once."""
        told = reply.metrics
        passes = (told.get("forward", 0.0), told.get("backward", 0.0))
        if kind == "evaluate":
            evaluation = self._session.config.evaluation
            written = min(evaluation.generate, reply.examples) * evaluation.new_tokens
            return (self._tokens(node)[2] + written) * self.forward if reply.examples else 0.0
        if not any(passes):
            return 0.0
        rows, total, _ = self._tokens(node)
        batch = self._session.config.training.batch_size
        # A setup goes through all texts, and counts them in parts of a batch.
        texts = batch if kind == "setup" else min(batch, rows)
        return texts * total / rows * (passes[0] * self.forward + passes[1] * self.backward)

    def _count(self, node: int) -> tuple[int, int, int]:
        """Return a client's rows, and the tokens in them and in those that it holds out."""
        train, test = self._session.client_tokens(node)
        return len(train), _tokens(train), _tokens(test)


def per_token(module: nn.Module, *, elsewhere: int = 0, recomputes: bool = False) -> tuple[float, float]:
    """Return the operations that a token costs in a forward and in a backward pass.

    Args:
        module: shapes are enough.
        elsewhere: parameters of a model beside it, as far as that one is larger.
        recomputes: the backward pass computes layers again.

    >>> per_token(nn.Linear(4, 3)), per_token(nn.Linear(4, 3), recomputes=True)
    ((24.0, 48.0), (24.0, 72.0))
    """
    weights = multiplied(module)
    matrices = (p for p in module.parameters() if p.requires_grad and p.dim() > 1)
    trained = sum(p.numel() for p in matrices) / max(weights, 1)
    forward = 2.0 * (weights + elsewhere)
    backward = forward * (1.0 + min(trained, 1.0))
    return forward, backward + (forward if recomputes else 0.0)


def _tokens(tokens: Tokens) -> int:
    """Return how many tokens texts have, with their answers or second versions."""
    besides = (getattr(tokens, name, None) for name in ("answers", "worse"))
    return int(tokens.lengths.sum()) + sum(int(one.lengths.sum()) for one in besides if one is not None)


def entries(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter stands for; matrices in four bits are packed by twos."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def multiplied(module: nn.Module) -> int:
    """Return how many weights of a module tokens are multiplied with: no biases, no table that is looked up.

    >>> multiplied(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)))
    12
    """
    tables, matrices = set[int](), set[int]()
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            tables.add(id(part.weight))
        elif isinstance(part, nn.Linear):
            matrices.add(id(part.weight))  # may be a table as well, which then makes the logits
    looked_up = tables - matrices
    masked = [p for p in module.modules() if isinstance(p, nn.Linear) and is_parametrized(p, "weight")]
    zeros_too = sum(part.weight.numel() for part in masked)  # a product with zeros takes as long as any
    return zeros_too + sum(entries(p) for p in module.parameters() if p.dim() > 1 and id(p) not in looked_up)


def _elsewhere(session: Session) -> int:
    """Return the parameters of a model that clients hold beside the global one, as far as it is larger."""
    method, model = session.method, session.model
    return method.reference_parameters(model) - Method.reference_parameters(method, model)


def least_memory(session: Session) -> int:
    """Return bytes that a client cannot do without: the model, and what descending it keeps by weight.

    Activations, which depend on how a library computes, come on top.
    """
    model, config = session.model, session.config
    held = sum(p.numel() * p.element_size() for p in model.module.parameters()) + 4 * _elsewhere(session)
    if not method_options(config.method).descends:
        return held
    kept = 3 if config.training.optimizer == "adamw" else 1  # a gradient, and two moments
    return held + 4 * kept * sum(p.numel() for p in model.trainable().values())


def clock_of(session: Session) -> Clock | None:
    """Return the clock of a run's simulated devices; None where none are.

    Raises:
        ConfigError: a device has too little memory for the run.
    """
    config = session.config
    if config.simulation.profile is None:
        return None
    devices = assigned(config.simulation, config.clients, config.seed)
    require_memory(devices, least_memory(session))
    return Clock(devices, Work(session).flops, config.seed, config.server.deadline_s)


def require_memory(devices: Sequence[Named], needed: int) -> None:
    """Refuse a run that some client's device cannot hold.

    Raises:
        ConfigError: names the smallest device, what it has and what it would need.
    """
    least = min(devices, key=lambda one: one.device.memory_gb)
    have = int(1e9 * least.device.memory_gb)
    if needed > have:
        raise ConfigError(
            f"a {least.name} has {human_bytes(have)} of memory for training, and model and optimiser alone "
            f"need {human_bytes(needed)}: take a smaller model, model.quantize, or other devices in "
            "simulation.profile"
        )
