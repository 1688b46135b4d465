"""Federated LoRA: only adapters are trained and sent, and their products are aggregated as products.

    client k   trains A_k, B_k of W + s B A from the global (A, B); sends its changes and number of texts n_k
    server     with p_k = n_k / sum n, the rule turns {A_k, B_k, p_k} into the next global tensors:

    fedit      A <- sum p_k A_k, B <- sum p_k B_k; the product is not sum p_k B_k A_k (Zhang et al., 2024)
    ffa        A stays as initialised and is never sent; B <- sum p_k B_k           (Sun et al., 2024)
    alternate  B and A in turn, the other frozen: each mean is exact                (Chen et al., 2024)
    svd        B A <- best rank r of sum p_k B_k A_k                                (Bai et al., 2024)
    stack      base <- base + sum p_k B_k A_k, then a fresh A and B = 0             (Wang et al., 2024)
    residual   as fedit; base <- base + what its B A misses of sum p_k B_k A_k      (Singhal et al., 2024)
    hetero     A, B <- means of the zero-padded factors, weighted by ||B_k A_k||    (Cho et al., 2024)

Every node has the same scale s, so it cancels from all of this. "base" is a product of two frozen factors
that travels with the adapter and is added to W's output. Its shape never changes; ``adapter/`` holds
[B, base_B] and [A; base_A] as one adapter, true on the plain base model. A client of rank r_k < r (rules svd,
stack, hetero) holds and trains the leading r_k components only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from fedllm import lora, models
from fedllm.accumulator import WeightedSum
from fedllm.config import RunConfig, Section
from fedllm.errors import ConfigError, ModelError
from fedllm.models import Model
from fedllm.randomness import stream
from fedllm.tensors import Spec, Tensors, spec_of
from fedllm.training import descend, minibatches
from strategies.base import Answer, Commit, Exchange, Method, Passes, Reply, State, Work

__all__ = ["METHOD", "Lora", "Options"]

_AVERAGED = ("fedit", "ffa", "alternate")
_WITH_BASE = ("stack", "residual")
_MIXED = ("svd", "stack", "hetero")
_BASE_A, _BASE_B = ".base_A", ".base_B"
_ADAPTER = "default"  # the name peft gives an adapter that is given none


class Options(Section):
    """How adapters are aggregated, and which client has which rank."""

    rule: Literal["fedit", "ffa", "stack", "svd", "residual", "alternate", "hetero"] = "fedit"
    """Aggregation rule."""
    ranks: tuple[int, ...] = ()
    """Rank of each client, or with ``shares`` the ranks to hand out; empty gives every client tuning.rank."""
    shares: tuple[float, ...] = ()
    """Share of the clients that has each of ``ranks``; who has which is drawn by the seed."""
    memory_mb: tuple[float, ...] = ()
    """MiB each client has for adapter, gradients and optimiser: decides its rank instead of ``ranks``."""
    base_rank: int | None = Field(None, ge=1)
    """Rank that rules stack and residual keep of what they add to the base; unset keeps all, exactly."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.ranks and self.memory_mb:
            raise ValueError("ranks and memory_mb both decide the clients' ranks; give one")
        if self.shares and (len(self.shares) != len(self.ranks) or not math.isclose(sum(self.shares), 1.0)):
            raise ValueError(f"shares = {self.shares} must sum to 1, one for each of ranks = {self.ranks}")
        if min((*self.ranks, *self.memory_mb, *self.shares), default=1) <= 0:
            raise ValueError("ranks, shares and memory_mb must be positive")
        if self.base_rank is not None and self.rule not in _WITH_BASE:
            raise ValueError(f"base_rank belongs to the rules stack and residual, not to {self.rule}")
        return self


@dataclass
class Round:
    """What one round has folded so far."""

    number: int
    start: Tensors
    sum: WeightedSum | lora.FactorSum | lora.NormSum


class Lora(Method):
    """Federated LoRA with a choice of aggregation rule."""

    Options = Options

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options = Options.model_validate(config.options)
        self.rule = self.options.rule
        _check(config, self.options)

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with its adapter; ffa freezes A only now that it is attached."""
        model = models.load(self.config, labels)
        if self.rule == "fedit":
            return model
        parameters = model.trainable()
        layers = lora.pairs(parameters)
        for layer, (b, a) in layers.items():
            if parameters[a].ndim != 2 or (self.rule in _WITH_BASE and "lora_embedding_" in a):
                raise ModelError(f'lora.rule = "{self.rule}" cannot aggregate the adapter of {layer}')
            if self.rule == "ffa":
                parameters[a].requires_grad_(False)
            if self.rule in _WITH_BASE:
                base = self._bounded(
                    lora.complete(torch.zeros(parameters[b].shape[0], parameters[a].shape[1]))
                )
                _carry_base(model.module.get_submodule(layer), base)
        return model

    def initial(self, model: Model) -> Tensors:
        """Return adapter and head, and for stack and residual the base's factors, whose product is zero."""
        tensors = model.read()
        if self.rule in _WITH_BASE:
            for layer in lora.pairs(tensors):
                module: Any = model.module.get_submodule(layer)
                tensors[layer + _BASE_A] = module.base_A.detach().cpu().clone()
                tensors[layer + _BASE_B] = module.base_B.detach().cpu().clone()
        return tensors

    def view(self, tensors: Tensors, node: int) -> Tensors:
        """Cut every pair of factors to the node's rank: its best truncation."""
        if not self.mixed:
            return tensors
        rank = self.rank(tensors, node)
        cut = dict(tensors)
        for b, a in lora.pairs(tensors).values():
            factors = lora.leading(lora.Factors(tensors[b], tensors[a]), rank)
            cut[b], cut[a] = factors.b.contiguous(), factors.a.contiguous()
        return cut

    def load(self, model: Model, tensors: Tensors) -> None:
        """Give the adapter the rank of ``tensors`` and their values: a small device really holds less."""
        for name, parameter in model.trainable().items():
            if name in tensors and parameter.shape != tensors[name].shape:
                parameter.grad = None
                parameter.data = parameter.data.new_empty(tensors[name].shape)
        base = {name: value for name, value in tensors.items() if name.endswith((_BASE_A, _BASE_B))}
        model.write({name: value for name, value in tensors.items() if name not in base})
        for name, value in base.items():
            model.module.get_buffer(name).copy_(value)

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect changes of the adapter and the head; of one factor only where the other is frozen."""
        trained = {name: t for name, t in tensors.items() if not name.endswith((_BASE_A, _BASE_B))}
        for b, a in lora.pairs(tensors).values():
            if self.rule == "alternate":
                del trained[a if exchange.arguments["train"] == "B" else b]
        return spec_of(trained)

    def begin(self, state: State, round: int) -> Round:
        """Start the sum that the rule needs."""
        spec = self.spec(self._exchange(state), state.tensors)
        if self.rule in _AVERAGED:
            return Round(round, state.tensors, WeightedSum(spec))
        factors = {name for pair in lora.pairs(state.tensors).values() for name in pair}
        plain = sorted(spec if self.rule == "residual" else spec.keys() - factors)
        kind = lora.NormSum if self.rule == "hetero" else lora.FactorSum
        return Round(round, state.tensors, kind(state.tensors, plain))

    def plan(self, state: State, acc: Round) -> Exchange | Commit:
        """Ask for local training once; there is no setup."""
        return Commit() if acc.number == 0 or acc.sum.count else self._exchange(state)

    def run(self, work: Work) -> Answer:
        """Client: train the adapter on its own texts, send its changes."""
        training, model = self.config.training, work.model
        generator = stream(self.config.seed, "batches", work.round, work.node)
        batches = minibatches(work.train, training.batch_size, training.local_steps, generator)
        sent = self.spec(Exchange(work.kind, work.arguments), work.tensors)
        with _only(model.trainable(), sent) as parameters:
            losses = descend(list(parameters.values()), model.loss, batches, training, work.progress)
        update = {name: after - work.tensors[name] for name, after in model.read().items() if name in sent}
        steps = len(losses)
        return Answer(update, len(work.train), {"loss": sum(losses) / steps}, passes=Passes(steps, steps))

    def fold(self, acc: Round, kind: str, reply: Reply) -> Round:
        """Server: take in one reply; rules on products first add what the client started from."""
        if isinstance(acc.sum, WeightedSum):
            acc.sum.add(reply.tensors, reply.examples)
            return acc
        factors = {}
        for layer, (b, a) in acc.sum.layers.items():
            change = lora.Factors(reply.tensors[b], reply.tensors[a])
            held = lora.leading(lora.Factors(acc.start[b], acc.start[a]), change.rank)
            factors[layer] = lora.Factors(held.b + change.b, held.a + change.a)
        plain = {name: reply.tensors[name] for name in acc.sum.names}
        acc.sum.add(reply.node, factors, plain, reply.examples)
        return acc

    def step(self, state: State, acc: Round) -> tuple[Tensors, Tensors]:
        """Server: apply the rule to each layer; heads and the like take their mean change."""
        if not acc.sum.count:
            return state.tensors, state.memory
        after = dict(state.tensors)
        changes = acc.sum.mean() if isinstance(acc.sum, WeightedSum) else acc.sum.plain()
        for name, change in changes.items():
            after[name] = state.tensors[name] + change
        if isinstance(acc.sum, lora.NormSum):
            for layer, (b, a) in acc.sum.layers.items():
                if (mean := acc.sum.factors(layer)) is not None:
                    after[b], after[a] = mean.b.float(), mean.a.float()
        elif isinstance(acc.sum, lora.FactorSum):
            for layer in acc.sum.layers:
                after |= self._aggregate(layer, state, acc.sum, after)
        return after, state.memory

    def _aggregate(self, layer: str, state: State, total: lora.FactorSum, after: Tensors) -> Tensors:
        """Apply svd, stack or residual to one layer; ``after`` holds the plain means already."""
        b, a = total.layers[layer]
        old, mean = lora.Factors(state.tensors[b], state.tensors[a]), total.product(layer)
        if self.rule == "svd":
            kept = [mean, lora.unheld(old, total.weight_of_rank)] if self.mixed else [mean]
            new = lora.align(lora.truncate(lora.stack(kept, [1.0] * len(kept)), old.rank), old)
            return {b: new.b.float(), a: new.a.float()}
        base = lora.Factors(state.tensors[layer + _BASE_B], state.tensors[layer + _BASE_A])
        if self.rule == "stack":
            base = self._bounded(lora.stack([base, mean], [1.0, 1.0]))
            fresh = {b: torch.zeros_like(old.b), a: _fresh(old.a, self.config.seed, layer, state.version + 1)}
        else:
            base = self._bounded(lora.stack([base, mean, lora.Factors(after[b], after[a])], [1.0, 1.0, -1.0]))
            fresh = {}
        return fresh | {layer + _BASE_B: base.b.float(), layer + _BASE_A: base.a.float()}

    def _bounded(self, product: lora.Factors) -> lora.Factors:
        """Keep all of a product in the shape of a full matrix, or the best ``base_rank`` of it."""
        rank, most = self.options.base_rank, min(product.b.shape[0], product.a.shape[1])
        if rank is None or rank >= most:
            return lora.complete(product.product())
        return lora.truncate(product, rank)

    def _exchange(self, state: State) -> Exchange:
        """B comes first: while B is zero, A has no gradient."""
        turn = {"train": "B" if state.version % 2 == 0 else "A"} if self.rule == "alternate" else {}
        return Exchange("fit", turn)

    @property
    def mixed(self) -> bool:
        """Whether clients differ in rank."""
        return bool(self.options.ranks or self.options.memory_mb)

    @cached_property
    def _ranks(self) -> tuple[int, ...]:
        """Rank of each client where the configuration gives ranks."""
        ranks, shares, clients = self.options.ranks, self.options.shares, self.config.clients
        if not shares:
            return ranks
        bounds = [round(clients * sum(shares[: i + 1])) for i in range(len(shares))]
        dealt = [rank for i, rank in enumerate(ranks) for _ in range(bounds[i] - (bounds[i - 1] if i else 0))]
        order = stream(self.config.seed, "ranks").permutation(clients)
        return tuple(dealt[i] for i in order)

    def rank(self, tensors: Tensors, node: int) -> int:
        """Return a client's rank; by memory it is the largest whose factors, gradients and moments fit."""
        if self.options.ranks:
            return self._ranks[node]
        values = sum(tensors[b].shape[0] + tensors[a].shape[1] for b, a in lora.pairs(tensors).values())
        memory = self.options.memory_mb[node]
        rank = int(memory * 2**20 / (16 * values))  # four float32 per value
        if rank < 1:
            raise ConfigError(
                f"lora.memory_mb gives client {node} {memory:g} MiB; rank 1 takes {16 * values / 2**20:.3g}"
            )
        return min(rank, self.config.tuning.rank)

    def save(self, model: Model, tensors: Tensors, folder: Path) -> None:
        """Write ``adapter/``, with what was added to the base as further components of each layer."""
        if self.rule not in _WITH_BASE:
            super().save(model, tensors, folder)
            return
        wide, ranks, alphas = dict(tensors), {}, {}
        for layer, (b, a) in lora.pairs(tensors).items():
            base = lora.Factors(tensors[layer + _BASE_B], tensors[layer + _BASE_A])
            whole = lora.compact(lora.stack([lora.Factors(tensors[b], tensors[a]), base], [1.0, 1.0]))
            wide |= {b: whole.b.float(), a: whole.a.float()}
            wide |= {name: torch.zeros_like(wide[name]) for name in (layer + _BASE_A, layer + _BASE_B)}
            module: Any = model.module.get_submodule(layer)
            path = layer.removeprefix("backbone.base_model.model.")
            ranks[path] = whole.rank
            power = 0.5 if module.use_rslora[_ADAPTER] else 1.0
            alphas[path] = module.scaling[_ADAPTER] * whole.rank**power
        backbone: Any = model.module.backbone
        settings = backbone.peft_config[_ADAPTER]
        before = settings.rank_pattern, settings.alpha_pattern
        settings.rank_pattern, settings.alpha_pattern = ranks, alphas
        try:
            super().save(model, wide, folder)
        finally:
            settings.rank_pattern, settings.alpha_pattern = before
            self.load(model, tensors)


METHOD = Lora


def _check(config: RunConfig, options: Options) -> None:
    """Refuse combinations that cannot mean what they say; each message names both sides."""
    rule, tuning, server = f'lora.rule = "{options.rule}"', config.tuning, config.server

    def refuse(condition: bool, reason: str) -> None:
        if condition:
            raise ConfigError(reason)

    refuse(tuning.peft == "full", 'method = "lora" needs an adapter: tuning.peft = "full" goes with "fedavg"')
    plain = tuning.peft in ("lora", "rslora") and not tuning.options.get("use_dora")
    refuse(
        options.rule != "fedit" and not plain,
        f'{rule} aggregates products B A, tuning.peft = "{tuning.peft}" has more than that: use rule fedit',
    )
    refuse(
        options.rule not in ("fedit", "ffa") and (server.optimizer, server.learning_rate) != ("sgd", 1.0),
        f'{rule} sets the next factors itself: server.optimizer = "{server.optimizer}" with learning rate '
        f'{server.learning_rate:g} would move off them; use "sgd" with 1.0',
    )
    moving = {"up": ("svd", "stack", "hetero", "alternate"), "down": ("svd", "stack", "hetero")}
    for way, rules in moving.items():
        spelled = getattr(config.codec, way)
        refuse(
            ("feedback" in spelled or "ef21" in spelled)
            and (options.rule in rules or (way == "down" and options.base_rank is not None)),
            f"{rule} changes the factors' basis between rounds, so codec.{way} = {spelled!r} would add "
            "residuals of other factors; leave error feedback out, or use rule fedit, ffa or residual",
        )
    mixed = bool(options.ranks or options.memory_mb)
    refuse(
        mixed and options.rule not in _MIXED,
        f"{rule} needs one rank for all; mixed ranks: {', '.join(_MIXED)}",
    )
    refuse(
        mixed and config.codec.down != "none",
        f'clients of mixed ranks hold different tensors: codec.down = {config.codec.down!r} must be "none"',
    )
    for key, given in {
        "ranks": options.ranks if not options.shares else (),
        "memory_mb": options.memory_mb,
    }.items():
        refuse(
            bool(given) and len(given) != config.clients,
            f"lora.{key} lists {len(given)} clients, clients = {config.clients}",
        )
    refuse(
        max(options.ranks, default=0) > tuning.rank,
        f"lora.ranks reach {max(options.ranks, default=0)}, the global rank is tuning.rank = {tuning.rank}",
    )


@contextmanager
def _only(parameters: Mapping[str, nn.Parameter], names: Spec) -> Iterator[dict[str, nn.Parameter]]:
    """Freeze all but ``names`` for a while: what is not trained needs no gradient."""
    frozen = [parameter for name, parameter in parameters.items() if name not in names]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield {name: parameter for name, parameter in parameters.items() if name in names}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _carry_base(layer: Any, base: lora.Factors) -> None:
    """Let a peft layer add s base_B base_A x to its output, as if its frozen weight had changed."""
    device = layer.lora_A[_ADAPTER].weight.device
    layer.register_buffer("base_A", base.a.float().to(device), persistent=False)
    layer.register_buffer("base_B", base.b.float().to(device), persistent=False)

    def add(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.linear(inputs[0].to(module.base_A.dtype), module.base_A)
        change = nn.functional.linear(inner, module.base_B)
        return output.add(change.to(output.dtype), alpha=module.scaling[_ADAPTER])

    layer.register_forward_hook(add)


def _fresh(like: torch.Tensor, seed: int, layer: str, version: int) -> torch.Tensor:
    """Draw A anew as LoRA initialises it: uniform in +-1/sqrt(n)."""
    bound = 1.0 / math.sqrt(like.shape[1])
    values = stream(seed, "fresh-A", layer, version).uniform(-bound, bound, tuple(like.shape))
    return torch.from_numpy(values).to(like.dtype)
