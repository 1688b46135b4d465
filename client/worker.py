"""The client's work: from one instruction to one reply.

This is the half of a round that runs where the data are. It brings the model to the version that the server
names, lets the method work, encodes the answer, and remembers the state before anything is sent.
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from flwr.app import ConfigRecord, RecordDict

from client import secure
from client.device.collection import Bounds, collect, mark
from client.memory import GlobalMemory, Local, NodeMemory
from client.node import NodeContext
from client.outward import reason
from client.spending import Spending
from fedllm.codecs.base import Dense
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, FedllmError, WireError
from fedllm.host.resources import peak_rss_bytes
from fedllm.plugins import require_installed
from fedllm.protocol import wire
from fedllm.protocol.increments import receive
from fedllm.protocol.uplink import Sent, Uplink, Upload, clip_of
from fedllm.protocol.wire import STALE, Instruction, Reply
from fedllm.randomness import derive
from fedllm.tensors import Tensors, digest, fingerprint
from strategies.attack import attackers, bent, poisoned
from strategies.base import Answer, Work
from strategies.session import Session, open_session

__all__ = ["answer", "answer_bytes", "open_globals"]

_log = logging.getLogger("fedllm.worker")


def answer_bytes(request: bytes) -> bytes:
    """Answer a request of the thin client process: serialized records in, serialized records out."""
    content = wire.decode(request)
    place, config = content.pop("place", None), content.pop("config", None)
    if not isinstance(place, ConfigRecord) or not isinstance(config, ConfigRecord):
        raise WireError("the request names neither configuration nor place; was it sent by client.app?")
    return wire.encode(answer(content, str(config["json"]), NodeContext.from_record(place)))


def answer(content: RecordDict, config: str, place: NodeContext) -> RecordDict:
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
        if place.on_device:  # which runs no code that a server names
            _require_harmless(RunConfig.from_json(config))
            secure.require_masked(RunConfig.from_json(config), place)
            if place.data:
                _require_named(open_session(config, place.data))
        content = _Task(instruction, open_session(config, place.data), place).answer()
        _note(content, instruction, place)
        return content
    except FedllmError as error:
        who = {"node": float(place.node)} if instruction.kind == "describe" else {}
        said = reason(error) if place.on_device else str(error) or repr(error)
        return wire.pack_reply(Reply(instruction.round, instruction.index, metrics=who, error=said))


def _require_harmless(config: RunConfig) -> None:
    """Refuse a run that names code of its own, or has its clients attack each other."""
    require_installed(config.plugins)
    if config.attack.kind != "none":
        raise ConfigError(f'attack.kind = "{config.attack.kind}" is for simulations, and this is a device')


def _require_named(session: Session) -> None:
    """Refuse a run that does not name its classes: what a device's labels say would then name its metrics."""
    if not session.config.data.classes and session.corpus.label_names:
        raise ConfigError(
            "the run does not name its classes (data.classes), and this device tells none of its own"
        )


@lru_cache(maxsize=1)
def open_globals(folder: Path) -> GlobalMemory:
    """Return this process's memory of a run's global tensors."""
    return GlobalMemory(folder)


@dataclass(frozen=True)
class _Task:
    instruction: Instruction
    session: Session
    place: NodeContext

    @property
    def config(self) -> RunConfig:
        return self.session.config

    @property
    def at(self) -> tuple[int, int]:
        return (self.instruction.round, self.instruction.index)

    def answer(self) -> RecordDict:
        if self.instruction.kind == "describe":
            return self._describe()
        if not self.config.privacy.secure_aggregation:
            return self._plain()
        place, instruction = self.place, self.instruction
        if instruction.kind in wire.SESSION:
            return secure.answer(self.config, place, instruction)
        secure.require_session(instruction)
        reply = self._plain()
        if wire.failure_of(reply):
            return reply
        return secure.masked(self.session, place, instruction, wire.unpack_reply(reply))

    def _plain(self) -> RecordDict:
        """Answer as where nothing is masked; a device keeps this answer, and sends it only so."""
        memory = NodeMemory(
            Path(self.place.folder) / self.instruction.run, keep_replies=self.place.keep_replies
        )
        if self.place.keep_replies:
            self._make_room()
        changes_state = self.instruction.kind != "evaluate"
        if changes_state:
            stored = memory.reply(self.at, self.instruction.digest)
            if stored is not None:
                return wire.decode(stored)
        started = time.perf_counter()
        tensors = self._global_tensors()
        if tensors is None:
            return wire.pack_reply(Reply(*self.at, error=STALE))
        local = memory.local(self.instruction.counted)
        if changes_state and self.instruction.index == 0:
            memory.forget_all_but(self.instruction.counted)
        answered, sent = self._work(tensors, local or Local())
        metrics = {
            **answered.metrics,
            **sent.metrics,
            "seconds": time.perf_counter() - started,
            "forward": answered.passes.forward,
            "backward": answered.passes.backward,
            "peak_rss_bytes": float(peak_rss_bytes()),
        }
        if answered.passes.once:
            metrics[wire.ONCE] = answered.passes.once
        if local is None:
            metrics["state_lost"] = 1.0
        # Kept with the answer, and taken out before it is sent.
        facts = {secure.STARTED: fingerprint(tensors)} if self.config.privacy.secure_aggregation else {}
        reply = wire.pack_reply(Reply(*self.at, answered.examples, metrics, facts, payload=sent.payload))
        if changes_state:
            kept = Local(answered.local, sent.residuals)
            memory.remember(self.at, kept, reply=wire.encode(reply), digest=self.instruction.digest)
        return reply

    def _make_room(self) -> None:
        """On a device, let the state of earlier runs go where it is more than should be kept."""
        state, run = Path(self.place.folder), self.instruction.run
        for sentence in collect(state, Bounds(self.place.keep_runs, self.place.state_limit), run):
            _say(sentence)
        mark(state, run, ended=self.instruction.round >= self.config.rounds)

    def _describe(self) -> RecordDict:
        train, test = self.session.client_tokens(self.place.node)
        self._spending(len(train.texts()))  # whoever cannot account for its steps takes no part
        machine = psutil.virtual_memory().total
        metrics = {
            "node": float(self.place.node),
            "held_out": float(len(test)),
            # What it works with, which may be less than the machine has.
            "cores": float(torch.get_num_threads()),
            "memory_bytes": float(min(self.place.memory or machine, machine)),
        }
        facts = {
            **self.session.shared,
            "platform": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        return wire.pack_reply(Reply(*self.at, len(train), metrics, facts=facts))

    def _global_tensors(self) -> Tensors | None:
        """Bring this node to the version the server names; ``None`` if it lost what it would start from."""
        instruction, method = self.instruction, self.session.method
        memory = open_globals(Path(self.place.shared) / instruction.run)
        tensors = memory.newest(instruction.digest)
        if tensors is None:
            initial = method.view(self.session.initial, self.place.node)
            held = initial if instruction.start == 0 else memory.get(instruction.start)
            tensors = receive(
                instruction, held, initial, self.config, self.session.codecs.down, method.replay
            )
            if tensors is None or digest(tensors) != instruction.digest:
                return None
        lossy = not isinstance(self.session.codecs.down, Dense) or method.replays
        memory.put(instruction.base, instruction.digest, tensors, durable=lossy and instruction.base > 0)
        memory.forget_below(instruction.oldest)
        return tensors

    def _work(self, tensors: Tensors, local: Local) -> tuple[Answer, Sent]:
        """Let the method work; return its answer, and what of it is sent."""
        instruction, node = self.instruction, self.place.node
        method, model = self.session.method, self.session.model
        train, test = self.session.client_tokens(node)  # which may ask the model about them
        method.load(model, tensors)
        spending, noise = self._spending(len(train.texts())), None
        if spending is not None:
            if instruction.kind != "fit":
                raise WireError(
                    f"asked for {instruction.kind!r}, which no noise covers, in a run with "
                    'privacy.unit = "example": this client answers nothing so'
                )
            noise = spending.spend(self.config, self.place, instruction, train)
        attacks = node in attackers(self.config)
        if attacks:
            train = poisoned(self.config, model, train)
        work = Work(
            kind=instruction.kind,
            arguments=instruction.arguments,
            round=instruction.round,
            index=instruction.index,
            node=node,
            progress=instruction.progress,
            model=model,
            tensors=tensors,
            local=local.method,
            train=train,
            test=test,
            noise=noise,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.config.seed, "torch", *self.at, node) % 2**63)
            answered = method.evaluate(work) if work.kind == "evaluate" else method.run(work)
        if attacks and work.kind == "fit":
            answered = replace(answered, tensors=bent(self.config, answered.tensors, *self.at, node))
        upload = Upload(work.kind, *self.at, node, instruction.progress, clip_of(work.arguments))
        uplink = Uplink(self.config, self.session.codecs.up)
        if spending is not None:
            answered = replace(answered, metrics={**answered.metrics, **spending.told(self.config)})
        return answered, uplink.send(upload, answered.tensors, local.codec)

    def _spending(self, texts: int) -> Spending | None:
        """Return what this client has spent of its texts' privacy, where it sees to that itself."""
        if self.config.privacy.hides != "example":
            return None
        return Spending.of(self.config, self.place, self.instruction.run, texts)


def _note(content: RecordDict, instruction: Instruction, place: NodeContext) -> None:
    """Log a device's reply by its digest, by which the run's chain tells whether it counted."""
    if place.on_device and instruction.kind in ("setup", "fit"):
        digest = wire.digest(wire.unpack_reply(content), instruction.run, place.node)
        _log.info("reply in round %d of run %s: %s", instruction.round, instruction.run, digest)


@lru_cache(maxsize=64)
def _say(sentence: str) -> None:
    """Log once what may be true of every instruction; the device's log travels to the server."""
    _log.info(sentence)
