"""The client's work: from one instruction to one reply.

This is the half of a round that runs where the data are. It brings the model to the version that the server
names, lets the method work, encodes the answer, and remembers the state before anything is sent.
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from flwr.app import ConfigRecord, RecordDict

from client.memory import GlobalMemory, NodeMemory
from client.place import Place
from fedllm import wire
from fedllm.codecs import parse
from fedllm.codecs.base import CodecContext
from fedllm.codecs.measure import relative_error
from fedllm.config import RunConfig
from fedllm.errors import FedllmError, WireError
from fedllm.randomness import derive
from fedllm.resources import peak_rss_bytes
from fedllm.tensors import Tensors, digest, pack, spec_of
from fedllm.wire import STALE, Instruction, Reply
from strategies.base import Answer, Work
from strategies.downlink import receive
from strategies.workshop import Workshop, open_workshop

__all__ = ["answer", "answer_bytes", "open_globals"]

_METHOD, _CODEC = "method/", "codec/"
"""Prefixes under which a node's durable state holds the method's and the codec's part."""


def answer_bytes(request: bytes) -> bytes:
    """Answer a request of the thin client process: serialized records in, serialized records out."""
    content = wire.decode(request)
    place, config = content.pop("place", None), content.pop("config", None)
    if not isinstance(place, ConfigRecord) or not isinstance(config, ConfigRecord):
        raise WireError("the request names neither configuration nor place; was it sent by client.app?")
    return wire.encode(answer(content, str(config["json"]), Place.from_record(place)))


def answer(content: RecordDict, config: str, place: Place) -> RecordDict:
    """Answer one instruction.

    Args:
        content: the instruction as a Flower record.
        config: the run's configuration as JSON.
        place: which node this is, and where its data and memory lie.

    Returns:
        The reply as a Flower record. What goes wrong in a foreseen way is said in ``Reply.error``.
    """
    instruction = wire.unpack_instruction(content)
    try:
        return _Task(instruction, open_workshop(config, place.data), place).answer()
    except FedllmError as error:
        return wire.pack_reply(Reply(instruction.round, instruction.index, error=str(error) or repr(error)))


@lru_cache(maxsize=1)
def open_globals(folder: Path) -> GlobalMemory:
    """Return this process's memory of a run's global tensors."""
    return GlobalMemory(folder)


@dataclass(frozen=True)
class _Task:
    instruction: Instruction
    workshop: Workshop
    place: Place

    @property
    def config(self) -> RunConfig:
        return self.workshop.config

    @property
    def at(self) -> tuple[int, int]:
        return (self.instruction.round, self.instruction.index)

    def answer(self) -> RecordDict:
        if self.instruction.kind == "describe":
            return self._describe()
        memory = NodeMemory(
            Path(self.place.folder) / self.instruction.run, keep_replies=self.place.keep_replies
        )
        changes_state = self.instruction.kind != "evaluate"
        if changes_state:
            stored = memory.reply(self.at, self.instruction.digest)
            if stored is not None:
                return wire.decode(stored)
            if self.instruction.index == 0:
                memory.forget_all_but(self.instruction.counted)
        started = time.perf_counter()
        tensors = self._global_tensors()
        if tensors is None:
            return wire.pack_reply(Reply(*self.at, error=STALE))
        local = memory.local(self.instruction.counted)
        answered, residuals, payload = self._work(tensors, local or {})
        metrics = {
            **answered.metrics,
            "seconds": time.perf_counter() - started,
            "forward": answered.passes.forward,
            "backward": answered.passes.backward,
            "peak_rss_bytes": float(peak_rss_bytes()),
        }
        if local is None:
            metrics["state_lost"] = 1.0
        reply = wire.pack_reply(Reply(*self.at, answered.examples, metrics, payload=payload))
        if changes_state:
            kept = {_METHOD + name: t for name, t in answered.local.items()}
            kept |= {_CODEC + name: t for name, t in residuals.items()}
            memory.remember(self.at, kept, reply=wire.encode(reply), digest=self.instruction.digest)
        return reply

    def _describe(self) -> RecordDict:
        train, test = self.workshop.client_tokens(self.place.node)
        metrics = {
            "node": float(self.place.node),
            "held_out": float(len(test)),
            "cores": float(psutil.cpu_count() or 1),
            "memory_bytes": float(psutil.virtual_memory().total),
        }
        facts = {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        return wire.pack_reply(Reply(*self.at, len(train), metrics, facts=facts))

    def _global_tensors(self) -> Tensors | None:
        """Bring this node to the version the server names; ``None`` if it lost what it would start from."""
        instruction, method = self.instruction, self.workshop.method
        memory = open_globals(Path(self.place.shared) / instruction.run)
        tensors = memory.newest(instruction.digest)
        if tensors is None:
            initial = method.view(self.workshop.initial, self.place.node)
            held = initial if instruction.start == 0 else memory.get(instruction.start)
            tensors = receive(instruction, held, initial, self.config, method)
            if tensors is None or digest(tensors) != instruction.digest:
                return None
        lossy = self.config.codec.down != "none" or method.replays
        memory.put(instruction.base, instruction.digest, tensors, durable=lossy and instruction.base > 0)
        memory.forget_below(instruction.oldest)
        return tensors

    def _work(self, tensors: Tensors, local: Tensors) -> tuple[Answer, Tensors, bytes]:
        """Let the method work; return its answer, the codec's next residuals and the encoded payload."""
        instruction, node = self.instruction, self.place.node
        method, model = self.workshop.method, self.workshop.model
        method.load(model, tensors)
        train, test = self.workshop.client_tokens(node)
        work = Work(
            kind=instruction.kind,
            arguments=instruction.arguments,
            round=instruction.round,
            index=instruction.index,
            node=node,
            progress=instruction.progress,
            model=model,
            tensors=tensors,
            local=_part(local, _METHOD),
            train=train,
            test=test,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.config.seed, "torch", *self.at, node) % 2**63)
            answered = method.evaluate(work) if work.kind == "evaluate" else method.run(work)
        before = _part(local, _CODEC)
        if instruction.kind != "fit":
            return answered, before, pack(answered.tensors)
        answered = _clip(answered, self.config.privacy.clip)
        context = CodecContext(self.config.seed, ("up", *self.at, node), instruction.progress)
        codec = parse(self.config.codec.up)
        payload, residuals = codec.encode(answered.tensors, before, context)
        answered.metrics.update(context.notes)
        if self.config.codec.up != "none":
            decoded, _ = codec.decode(payload, spec_of(answered.tensors), before, context)
            answered.metrics["error_up"] = relative_error(answered.tensors, decoded)
        return answered, residuals, payload


def _part(local: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in local.items() if name.startswith(prefix)}


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def _clip(answered: Answer, limit: float | None) -> Answer:
    """Scale the update down to an L2 norm of at most ``limit``, and report the norm it had."""
    norm = _norm(answered.tensors)
    tensors = answered.tensors
    if limit is not None and norm > limit:
        tensors = {name: t * (limit / norm) for name, t in tensors.items()}
    metrics = {**answered.metrics, "update_norm": norm}
    return Answer(tensors, answered.examples, metrics, answered.local, answered.passes)
