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
    fed-sb     W + s B R A, B and A measured once and frozen: R <- sum p_k R_k      (Singhal et al., 2025)
    fedsa      A <- sum p_k A_k; B_k stays with client k, from round to round           (Guo et al., 2025)

Every node has the same scale s, so it cancels from all of this. "base" is a product of two frozen factors
that travels with the adapter and is added to W's output. Its shape never changes; ``adapter/`` holds
[B, base_B] and [A; base_A] as one adapter, true on the plain base model. A client of rank r_k < r (rules svd,
stack, hetero) holds and trains the leading r_k components only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedllm.config import RunConfig
from fedllm.errors import ConfigError, ModelError, WireError
from fedllm.models import model as models
from fedllm.models.model import Model
from fedllm.models.saving import tell_lack
from fedllm.models.training import only, stride
from fedllm.randomness import stream
from fedllm.sums import WeightedSum
from fedllm.tensors import Spec, Tensors, pack, spec_of, unpack
from strategies.base import Answer, Commit, Exchange, Method, Replay, Reply, State, Step, Work
from strategies.blocks import turns
from strategies.lora import factors as lora
from strategies.lora import middle
from strategies.lora.combinations import check
from strategies.lora.layers import ADAPTER, carry_base, fresh, takes_from_base
from strategies.lora.options import LACKING, WITH_BASE, Options
from strategies.private import sum_of
from strategies.robust import Kept
from strategies.steps import take

__all__ = ["Lora", "Options"]

_AVERAGED = ("fedit", "ffa", "alternate", "fed-sb", "fedsa")
_NO_EMBEDDINGS = (*WITH_BASE, "fed-sb", "fedsa")
_BASE_A, _BASE_B = ".base_A", ".base_B"
_DIRECTIONS, _TRAINED = b"d", b"t"


@dataclass
class LoraAccumulator:
    """What one round has folded so far."""

    number: int
    start: Tensors
    sum: WeightedSum | Kept | lora.FactorSum | lora.NormSum


class Lora(Method):
    """Federated LoRA with a choice of aggregation rule."""

    Options = Options

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options = Options.model_validate(config.options)
        self.rule = self.options.rule
        self.blocks = turns(config)
        self.replays = self.rule == "fed-sb" or self.blocks is not None
        self.asynchronous = self.rule in ("fedit", "ffa")  # which add mean changes to the old factors
        self.averages = self.rule in _AVERAGED and self.rule != "fed-sb"  # whose directions are a product's
        self.sums = self.averages and self.rule != "fedsa"  # whose clients must score their own halves
        self.private = self.rule in ("fedit", "ffa", "alternate")  # all else is no sum, or measured first
        self.private_steps = self.rule not in ("fed-sb", "fedsa")
        if self.blocks is not None:
            self.asynchronous = self.sums = self.private = self.private_steps = False
        self.lacking = LACKING if self.rule == "fedsa" else ""
        self._taken: dict[str, lora.Factors] = {}
        check(config, self.options)

    def build(self, labels: tuple[str, ...]) -> Model:
        """Load the base model with its adapter; ffa freezes A only now that it is attached."""
        model = models.load(self.config, labels)
        parameters = model.trainable()
        layers = lora.pairs(parameters)
        if takes_from_base(self.config) and self.rule != "ffa":
            self._taken = {
                layer: lora.Factors(
                    parameters[b].detach().cpu().clone(), parameters[a].detach().cpu().clone()
                )
                for layer, (b, a) in layers.items()
            }
        if self.rule == "fedit":
            return model
        for layer, (b, a) in layers.items():
            embedding = self.rule in _NO_EMBEDDINGS and "lora_embedding_" in a
            if parameters[a].ndim != 2 or embedding:
                raise ModelError(f'lora.rule = "{self.rule}" cannot aggregate the adapter of {layer}')
            if self.rule == "ffa":
                parameters[a].requires_grad_(False)
            if self.rule == "fed-sb":
                middle.insert(model.module.get_submodule(layer), layer, self.config.seed)
            if self.rule in WITH_BASE:
                base = self._bounded(
                    lora.complete(torch.zeros(parameters[b].shape[0], parameters[a].shape[1]))
                )
                carry_base(model.module.get_submodule(layer), base)
        return model

    def initial(self, model: Model) -> Tensors:
        """Return adapter and head, and for stack and residual the base's factors, whose product is zero."""
        tensors = {name: value for name, value in model.read().items() if name not in self._own(model)}
        if self.rule == "fed-sb":
            held = dict(model.module.named_parameters())
            for pair in lora.pairs(held).values():
                tensors |= {name: held[name].detach().to("cpu", torch.float32, copy=True) for name in pair}
        if self.rule in WITH_BASE:
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
        trained = self._trained(tensors)
        model.write(self._own(model) | trained)
        for name in tensors.keys() - trained.keys():
            layer, _, kind = name.rpartition(".")
            frozen: torch.Tensor = getattr(model.module.get_submodule(layer), kind)
            frozen.detach().copy_(tensors[name])

    def _own(self, model: Model) -> Tensors:
        """Return what each client keeps to itself under fedsa: its B, as it begins."""
        if self.rule != "fedsa":
            return {}
        parameters = model.trainable()
        return {b: torch.zeros(parameters[b].shape) for b, _ in lora.pairs(parameters).values()}

    def spec(self, exchange: Exchange, tensors: Tensors) -> Spec:
        """Expect changes of the adapter and the head; of one factor only where the other is frozen."""
        if exchange.kind == "setup":
            return spec_of({name: tensors[name] for pair in lora.pairs(tensors).values() for name in pair})
        trained = self._trained(tensors)
        for b, a in lora.pairs(tensors).values():
            if self.rule == "alternate":
                del trained[a if exchange.arguments["train"] == "B" else b]
        if self.blocks is not None:
            turn = self.blocks.of(trained, exchange.arguments)
            trained = {name: value for name, value in trained.items() if name in turn}
        return spec_of(trained)

    def _trained(self, tensors: Tensors) -> Tensors:
        """Leave out what is held and never changed by a client: the base, and the outer factors of fed-sb."""
        frozen: set[str] = set()
        if self.rule == "fed-sb":
            frozen = {name for pair in lora.pairs(tensors).values() for name in pair}
        return {
            name: value
            for name, value in tensors.items()
            if name not in frozen and not name.endswith((_BASE_A, _BASE_B))
        }

    def updates(self, tensors: Tensors) -> Spec:
        """Both factors, also where they take turns."""
        return spec_of(self._trained(tensors))

    def stands_for(self, tensors: Tensors) -> Spec:
        """Adapter and head, not what rules stack and residual added to the base: clients only hold it."""
        return self.updates(tensors)

    def stride(self, tensors: Tensors) -> float:
        """Server: as long as local training makes an update of adapter and head."""
        return stride(self.config.training, self._trained(tensors))

    def begin(self, state: State, round: int) -> LoraAccumulator:
        """Start the sum that the rule needs."""
        if round == 0 and self.rule == "fed-sb":
            return LoraAccumulator(round, state.tensors, lora.FactorSum(state.tensors, ()))
        spec = self.spec(self._exchange(state), state.tensors)
        if self.rule in _AVERAGED:
            return LoraAccumulator(round, state.tensors, sum_of(self.config, spec))
        factors = {name for pair in lora.pairs(state.tensors).values() for name in pair}
        plain = sorted(spec if self.rule == "residual" else spec.keys() - factors)
        kind = lora.NormSum if self.rule == "hetero" else lora.FactorSum
        return LoraAccumulator(round, state.tensors, kind(state.tensors, plain))

    def plan(self, state: State, acc: LoraAccumulator) -> Exchange | Commit:
        """Ask for local training once; fed-sb measures its directions first, unless it began with some."""
        if acc.sum.count or (acc.number == 0 and (self.rule != "fed-sb" or state.version > 0)):
            return Commit()
        return self._exchange(state) if acc.number else Exchange("setup")

    def run(self, work: Work) -> Answer:
        """Client: train the adapter on its own texts, send its changes."""
        if work.kind == "setup":
            return middle.measure(work, self.config.training.batch_size, self.config.seed)
        model, steps = work.model, self.config.training.local_steps
        sent = self.spec(Exchange(work.kind, work.arguments), work.tensors)
        own = self._personal(work)
        with only(model.trainable(), sent.keys() | own.keys()) as parameters:
            told, passes = take(self.config, work, parameters, steps)
        after = model.read()
        update = {name: value - work.tensors[name] for name, value in after.items() if name in sent}
        local = {name: after[name] for name in own}
        return Answer(update, len(work.train), told, local, passes)

    def _personal(self, work: Work) -> Tensors:
        """Client: put its own B, if the rule leaves it one, beside the global tensors; return it."""
        own = self._own(work.model) | work.local
        if own:
            work.model.write(work.tensors | own)
        return own

    def evaluate(self, work: Work) -> Answer:
        """Client: score what it has, its own B included."""
        self._personal(work)
        return super().evaluate(work)

    def fold(self, acc: LoraAccumulator, kind: str, reply: Reply) -> LoraAccumulator:
        """Server: take in one reply; rules on products first add what the client started from."""
        if isinstance(acc.sum, WeightedSum | Kept):
            acc.sum.add(reply.tensors, reply.examples)
            return acc
        if kind == "setup":
            measured = {
                layer: lora.Factors(reply.tensors[b], reply.tensors[a])
                for layer, (b, a) in acc.sum.layers.items()
            }
            middle.reject_longer(measured)
            acc.sum.add(reply.node, measured, {}, reply.examples)
            return acc
        factors = {}
        for layer, (b, a) in acc.sum.layers.items():
            change = lora.Factors(reply.tensors[b], reply.tensors[a])
            held = lora.leading(lora.Factors(acc.start[b], acc.start[a]), change.rank)
            factors[layer] = lora.Factors(held.b + change.b, held.a + change.a)
        plain = {name: reply.tensors[name] for name in acc.sum.names}
        acc.sum.add(reply.node, factors, plain, reply.examples)
        return acc

    def summed(self, acc: LoraAccumulator) -> WeightedSum | None:
        """Server: return the sum of changes, where the rule takes no more."""
        return acc.sum if isinstance(acc.sum, WeightedSum) else None

    def step(self, state: State, acc: LoraAccumulator) -> Step:
        """Server: apply the rule to each layer; heads and the like take their mean change."""
        if not acc.sum.count:
            return Step(state.tensors, state.memory)
        if acc.number == 0:
            return self._directed(state, acc)
        after = dict(state.tensors)
        changes = acc.sum.mean() if isinstance(acc.sum, WeightedSum | Kept) else acc.sum.plain()
        if self.blocks is not None:
            return Step(self.blocks.step(state.tensors, state.version, changes), state.memory)
        for name, change in changes.items():
            after[name] = state.tensors[name] + change
        if isinstance(acc.sum, lora.NormSum):
            for layer, (b, a) in acc.sum.layers.items():
                if (mean := acc.sum.factors(layer)) is not None:
                    after[b], after[a] = mean.b.float(), mean.a.float()
        elif isinstance(acc.sum, lora.FactorSum):
            for layer in acc.sum.layers:
                after |= self._aggregate(layer, state, acc.sum, after)
        if self.rule == "fed-sb":
            return Step(Replay(_TRAINED + pack({name: after[name] for name in changes})), state.memory)
        return Step(after, state.memory)

    def _directed(self, state: State, acc: LoraAccumulator) -> Step:
        """Server, fed-sb: turn the clients' gradients into the outer factors."""
        assert isinstance(acc.sum, lora.FactorSum)
        found: Tensors = {}
        for layer, (b, a) in acc.sum.layers.items():
            old = lora.Factors(state.tensors[b], state.tensors[a])
            found[b], found[a] = middle.directions(acc.sum.product(layer), old)
        return Step(Replay(_DIRECTIONS + pack(found)), state.memory)

    def replay(self, tensors: Tensors, record: bytes) -> Tensors:
        """Both sides: take up what a record holds, the outer factors of fed-sb or what is trained."""
        if self.blocks is not None:
            return self.blocks.replay(tensors, record)
        kinds = {_DIRECTIONS: "setup", _TRAINED: "fit"}
        if record[:1] not in kinds:
            raise WireError(f"unknown kind of replay record {record[:1]!r}")
        return tensors | unpack(record[1:], self.spec(Exchange(kinds[record[:1]]), tensors))

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
            renewed = {
                b: torch.zeros_like(old.b),
                a: fresh(old.a, self.config.seed, layer, state.version + 1),
            }
        else:
            base = self._bounded(lora.stack([base, mean, lora.Factors(after[b], after[a])], [1.0, 1.0, -1.0]))
            renewed = {}
        return renewed | {layer + _BASE_B: base.b.float(), layer + _BASE_A: base.a.float()}

    def _bounded(self, product: lora.Factors) -> lora.Factors:
        """Keep all of a product in the shape of a full matrix, or the best ``base_rank`` of it."""
        rank, most = self.options.base_rank, min(product.b.shape[0], product.a.shape[1])
        if rank is None or rank >= most:
            return lora.complete(product.product())
        return lora.truncate(product, rank)

    def _exchange(self, state: State) -> Exchange:
        """B comes first: while B is zero, A has no gradient."""
        if self.blocks is not None:
            return self.blocks.exchange(state.version)
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

    def save(self, model: Model, tensors: Tensors, folder: Path) -> Path:
        """Write ``adapter/``: what was added to the base is further components of each layer.

        PiSSA and OLoRA take their first product out of the base. Loading their adapters would do so anew,
        with whatever rank and SVD it meets; here that product is one more component of the adapter.
        """
        if self.rule == "fed-sb":
            try:
                return super().save(model, middle.folded(tensors), folder)
            finally:
                self.load(model, tensors)
        if self.rule not in WITH_BASE and not self._taken:
            place = super().save(model, tensors, folder)
            if self.lacking:
                tell_lack(place, self.lacking)
            return place
        wide, ranks, alphas = dict(tensors), {}, {}
        for layer, (b, a) in lora.pairs(tensors).items():
            parts, signs = [lora.Factors(tensors[b], tensors[a])], [1.0]
            if self.rule in WITH_BASE:
                parts.append(lora.Factors(tensors[layer + _BASE_B], tensors[layer + _BASE_A]))
                signs.append(1.0)
                wide |= {name: torch.zeros_like(wide[name]) for name in (layer + _BASE_A, layer + _BASE_B)}
            if layer in self._taken:
                parts.append(self._taken[layer])
                signs.append(-1.0)
            whole = lora.compact(lora.stack(parts, signs))
            wide |= {b: whole.b.float(), a: whole.a.float()}
            module: Any = model.module.get_submodule(layer)
            path = layer.removeprefix("backbone.base_model.model.")
            ranks[path] = whole.rank
            power = 0.5 if module.use_rslora[ADAPTER] else 1.0
            alphas[path] = module.scaling[ADAPTER] * whole.rank**power
        backbone: Any = model.module.backbone
        settings = backbone.peft_config[ADAPTER]
        before = settings.rank_pattern, settings.alpha_pattern, settings.init_lora_weights
        settings.rank_pattern, settings.alpha_pattern, settings.init_lora_weights = ranks, alphas, True
        try:
            return super().save(model, wide, folder)
        finally:
            settings.rank_pattern, settings.alpha_pattern, settings.init_lora_weights = before
            self.load(model, tensors)
