"""Before a run: what each way to train takes on a device, what fits, and which one to take.

Memory is counted, not measured (:mod:`simulations.shapes`), operations as simulated devices count them
(:mod:`server.rounds.timing.work`), bytes by the method's own account of what it sends.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedllm import tasks
from fedllm.codecs import Codecs
from fedllm.codecs.base import CodecContext, FramedCodec
from fedllm.config import RunConfig
from fedllm.data.bundled import model_source
from fedllm.data.tokens import Batch
from fedllm.errors import ConfigError, FedllmError
from fedllm.models.base.loading import open_tokenizer, quiet
from fedllm.models.model import Model
from fedllm.secagg import words
from fedllm.secagg.keys import KEY_BYTES
from fedllm.secagg.letters import SEALED_BYTES
from fedllm.secagg.ring import Ring
from fedllm.secagg.shamir import SHARE_BYTES
from fedllm.tasks.base import PerToken
from fedllm.tensors import Spec, dense_bytes, spec_of
from fedllm.wording import human_bytes
from server.rounds.timing.work import per_token
from simulations.shapes import peak_bytes, without_weights
from strategies.base import Exchange, Method
from strategies.forward.cohort import Cohort, pack_cohort
from strategies.forward.directions import Direction
from strategies.forward.slopes import antithetic, batch_loss, derivatives, passes, settled
from strategies.registry import method_options, open_codecs, open_method, resolve_run

__all__ = ["SPREAD", "WAYS", "Estimate", "Limits", "Plan", "estimate", "matmul_rate", "plan"]

BESIDE = {True: 40_000_000, False: 6_000_000}
"""Bytes that a step takes beside its tensors, with a backward pass and without, as measured (docs/memory.md):
what the allocator cannot give back, buffers of products, code that is fetched as it first runs."""
HEADERS = 400
"""Bytes of a message beside its tensors."""
_TEXTS_OF_A_CLIENT = 1_000
_SAMPLE = 1 << 20
"""Values of an update that a codec is tried on."""

_FIT = Exchange("fit", {"train": "B", "block": 0})
"""Of a round. Where factors take turns (rule alternate) B is first, and what it takes stands for both; where
groups of layers do, the lowest takes most: it has the embeddings, and the way back to it is the longest."""

WAYS: dict[str, dict[str, Any]] = {
    "full": {"method": "fedavg", "tuning.peft": "full", "tuning.targets": [], "training.memory": "plain"},
    "full, thirds": {
        "method": "fedavg",
        "tuning.peft": "full",
        "tuning.targets": [],
        "tuning.blocks": 3,
        "training.memory": "plain",
    },
    "lora": {"method": "lora", "training.memory": "plain"},
    "lora, checkpoint": {"method": "lora", "training.memory": "checkpoint"},
    "lora, lean": {"method": "lora", "training.memory": "lean"},
    "fwdllm, jvp": {"method": "fwdllm", "training.memory": "plain", "fwdllm.estimator": "jvp"},
    "fwdllm, antithetic": {"method": "fwdllm", "training.memory": "plain", "fwdllm.estimator": "antithetic"},
    "mezo": {"method": "mezo", "training.memory": "plain"},
    "fedkd": {"method": "fedkd", "training.memory": "plain"},
}
"""Ways to train, each with the settings that make it."""

SPREAD: dict[str, float | None] = {
    "full": None,
    "full, thirds": None,
    "lora": 0.1,
    "lora, checkpoint": 0.4,
    "lora, lean": 0.15,
    "fwdllm, jvp": None,
    "fwdllm, antithetic": 0.25,
    "mezo": 0.25,
    "fedkd": None,
}
"""How far a step's memory was off where it was measured (docs/memory.md); None where it was not."""


@dataclass(frozen=True)
class Limits:
    """What a device has.

    Attributes:
        memory: bytes; None for no bound.
        link: bits a second, up and down; None where transfers take no time.
        computes: seconds that so many operations take at least.
        resident: bytes of a process that has loaded what computes, and no model.
    """

    memory: float | None
    link: tuple[float, float] | None
    computes: Callable[[float], float]
    resident: int


@dataclass(frozen=True)
class Estimate:
    """What one way takes; only ``way`` and ``refused`` where the configuration does not admit it.

    Attributes:
        way: its name in :data:`WAYS`.
        settings: what ``--set`` makes of the configuration for it.
        refused: why it cannot be, or empty.
        exact: whether it goes down gradients, not estimates of them from forward passes.
        model: bytes of the loaded model, or models.
        step: bytes of a step above them.
        total: bytes of the whole process at the step's peak.
        seconds: of computing in a local step, at least.
        up, down: bytes of a client's round.
        round: seconds of a client's round, transfers included, at least.
        fits: whether the memory suffices, also where a step takes as much more as was measured.
    """

    way: str
    settings: dict[str, Any]
    refused: str = ""
    exact: bool = False
    model: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    up: int = 0
    down: int = 0
    round: float = 0.0
    fits: bool = False


@dataclass(frozen=True)
class Plan:
    """All ways, the one to take (None where nothing fits), and why."""

    estimates: tuple[Estimate, ...]
    chosen: str | None
    why: str


def plan(config: RunConfig, limits: Limits, tell: Callable[[str], None] = lambda way: None) -> Plan:
    """Estimate every way to train that a configuration admits, and choose.

    Args:
        config: says model, task, texts' length, steps, adapter and codecs.
        limits: of the device.
        tell: is told of each way before it is counted.

    Raises:
        FedllmError: the model cannot be found or read.
    """
    _require_known(config)
    with quiet():  # a model that is not there is no way's refusal
        open_tokenizer(model_source(config.model.name), config)
    found = []
    for way in WAYS:
        tell(way)
        with quiet():
            found.append(_estimated(way, config, limits))
    return Plan(tuple(found), *_choice(found, limits))


def _require_known(config: RunConfig) -> None:
    task = tasks.of(config)
    language = isinstance(task, PerToken) and task.pooling == "causal" and not task.prepares
    if not (task.closed_form or language):
        raise ConfigError(
            "fedllm plan knows the batches of classification under a head of ours, causal and instruct, not "
            f'of model.task = "{config.model.task}" with model.pooling = "{config.model.pooling}"'
        )


def _choice(found: Sequence[Estimate], limits: Limits) -> tuple[str | None, str]:
    """Exact gradients before estimates of them, then the shortest round."""
    able = [one for one in found if not one.refused]
    if not able:
        return None, "the configuration admits none of these ways"
    fitting = [one for one in able if one.fits]
    if not fitting:
        least = min(able, key=lambda one: one.total)
        return None, (
            f"nothing fits: {least.way} takes least, {human_bytes(least.total)}; take a smaller model, "
            "training.batch_size or data.max_length"
        )
    best = min(fitting, key=lambda one: (not one.exact, one.round))
    if best.exact:
        return best.way, "of all that fits with exact gradients it has the shortest round"
    return best.way, (
        "no way with exact gradients fits; of those that measure slopes in forward passes, and take many "
        "more rounds, it has the shortest"
    )


def _estimated(way: str, config: RunConfig, limits: Limits) -> Estimate:
    settings = WAYS[way]
    try:
        return estimate(way, _as(config, settings), limits)
    except FedllmError as error:
        return Estimate(way, settings, refused=str(error))


def _as(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """Return a configuration changed to another way; options of another method are left out."""
    document = config.to_document()
    if settings["method"] != config.method:
        document.pop(config.method, None)
    document["training"]["gradient_checkpointing"] = False
    if "tuning.peft" not in settings and config.tuning.peft == "full" and settings["method"] != "fedkd":
        settings = settings | {"tuning.peft": "lora"}
    return resolve_run(document, [(key.split("."), value) for key, value in settings.items()])


def estimate(way: str, config: RunConfig, limits: Limits) -> Estimate:
    """Return what a configuration takes.

    Raises:
        FedllmError: it cannot be, as a run would say it.
    """
    method, labels = open_method(config), config.data.classes or ("0", "1")
    exact = method_options(config.method).descends
    model_source(config.model.name)  # a GGUF file is converted once, and cannot be without weights
    with without_weights():
        model = method.build(tuple(labels) if tasks.of(config).classed else ())
        objective, beside = method.objective(model)
    modules = [model.module, *beside]
    tensors = {name: torch.empty(p.shape, device="meta") for name, p in model.trainable().items()}
    if exact:  # what a round leaves alone needs no gradient
        sent = method.spec(_FIT, tensors)
        for name, parameter in model.trainable().items():
            parameter.requires_grad_(name in sent)
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    held = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    training, batch = config.training, _batch(config)
    tokens = batch.input_ids.numel()
    costs = [per_token(module, recomputes=training.recomputes) for module in modules]
    forward, backward = (tokens * sum(column) for column in zip(*costs, strict=True))
    up, down = _bytes(config, method, tensors, _base(model))
    if exact:
        kept = (8 if training.optimizer == "adamw" else 0) * sum(p.numel() for p in trained)
        operations, steps = forward + backward, training.local_steps
        step = kept + peak_bytes(modules, lambda: objective(batch).backward())  # type: ignore[no-untyped-call]
    else:
        count, steps = _probes(config)
        operations, kept = count * forward, 0
        step = round(peak_bytes(modules, lambda: _probe(config, model, batch)) * _side_by_side(config))
    step += BESIDE[exact]
    # What the server sent is kept beside the model, to tell the update by.
    total = limits.resident + held + step + sum(4 * tensor.numel() for tensor in tensors.values())
    seconds = limits.computes(operations)
    transfer = 0.0 if limits.link is None else 8 * (up / limits.link[0] + down / limits.link[1])
    fits = limits.memory is None or total + (SPREAD.get(way) or 0.0) * step <= limits.memory
    whole = steps * seconds + transfer
    return Estimate(way, WAYS.get(way, {}), "", exact, held, step, total, seconds, up, down, whole, fits)


def _batch(config: RunConfig) -> Batch:
    """Return a batch of the largest size."""
    ids = torch.zeros(config.training.batch_size, config.data.max_length, dtype=torch.int64)
    labels = ids if tasks.of(config).pooling == "causal" else torch.zeros(len(ids), dtype=torch.int64)
    return Batch(ids, torch.ones_like(ids), labels)


def _probes(config: RunConfig) -> tuple[int, int]:
    """Return the forward passes of a local step of a method without gradients, and its steps in a round."""
    options = config.options
    if config.method == "mezo":
        return 2, config.training.local_steps
    return passes(options["directions"], options["estimator"], options["parallel"]), 1


def _probe(config: RunConfig, model: Model, batch: Batch) -> None:
    """Measure one slope."""
    values = {name: p.detach() for name, p in model.trainable().items()}
    with settled(model.module):
        loss = batch_loss(model, batch)
        if config.options.get("estimator") == "jvp":
            derivatives(loss, values, [Direction(0, 1, 0, 0)])
        else:
            antithetic(loss, values, [Direction(0, 1, 0, 0)])


def _side_by_side(config: RunConfig) -> float:
    """Return how much more several directions take than one: they share the loss, and each has a tangent."""
    if config.options.get("estimator") != "jvp":
        return 1.0
    side = min(int(config.options["parallel"]), int(config.options["directions"]))
    return (1 + side) / 2


def _base(model: Model) -> Spec:
    """Return what rules stack and residual add to the base, which every client is sent."""
    there = model.module.named_buffers()
    return spec_of({name: one for name, one in there if name.endswith((".base_A", ".base_B"))})


def _bytes(
    config: RunConfig, method: Method, tensors: dict[str, torch.Tensor], base: Spec
) -> tuple[int, int]:
    """Return what a client sends and gets in a round."""
    codecs: Codecs = open_codecs(config)
    spec = method.spec(_FIT, tensors)
    up = _coded(codecs.up, spec) + HEADERS
    more = 0
    if config.privacy.secure_aggregation:
        up, more = _secure(config, codecs.up, spec)
    if not method.replays:
        return up, _coded(codecs.down, {**method.updates(tensors), **base}) + HEADERS + more
    if method_options(config.method).descends:  # a step is what was trained, in full
        return up, dense_bytes(spec) + HEADERS + more
    slopes = np.zeros(sum(one.shape[0] for one in spec.values()), dtype=np.float32)
    nodes = range(config.answers)
    record = pack_cohort(Cohort(1, dict.fromkeys(nodes, slopes), dict.fromkeys(nodes, 1)))
    return up, len(record) + HEADERS + more


def _secure(config: RunConfig, codec: FramedCodec, spec: Spec) -> tuple[int, int]:
    """Return what a client sends in the four steps of secure aggregation, and what it gets beside tensors.

    Where a value takes less than 64 bits, that hangs on all texts together; here each client has a thousand.
    """
    texts = 1 if config.privacy.noised else min(_TEXTS_OF_A_CLIENT, config.server.max_examples)
    weight = config.answers * texts
    bits = Ring.of(config, codec, weight).bits
    others = min(config.privacy.neighbours or config.answers, config.answers) - 1
    values = words.packed_size(sum(one.numel for one in spec.values()), bits)
    letters = (SEALED_BYTES + SHARE_BYTES) * others + 2 * KEY_BYTES
    told = (2 * KEY_BYTES + 4) * config.answers + SEALED_BYTES * others
    return values + letters + 4 * HEADERS, told + 3 * HEADERS


def _coded(codec: FramedCodec, spec: Spec) -> int:
    """Return the bytes of normal values under a codec; a large update is judged by a part of it."""
    dense = dense_bytes(spec)
    if str(codec) == "none":
        return dense
    part: dict[str, torch.Tensor] = {}
    for name, one in spec.items():
        if sum(tensor.numel() for tensor in part.values()) < _SAMPLE:
            part[name] = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    payload, _ = codec.encode(part, {}, CodecContext())
    return round(len(payload) * dense / sum(tensor.nbytes for tensor in part.values()))


def matmul_rate(config: RunConfig, samples: int = 5) -> float:
    """Measure this process's operations a second in products of a batch's tokens, in the base's precision."""
    dtype = getattr(torch, config.model.dtype)
    rows, width = config.training.batch_size * config.data.max_length, 1024
    left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    taken = []
    for _ in range(samples + 1):
        started = time.process_time()  # of all threads, which a busy machine disturbs less
        left @ right
        taken.append(time.process_time() - started)
    return 2.0 * rows * width * width * torch.get_num_threads() / statistics.median(taken[1:])
