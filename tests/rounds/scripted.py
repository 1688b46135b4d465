"""The real engine between a script and a method of three numbers: no model, no texts, milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Error, Message

from fedllm.codecs import Codecs, parse
from fedllm.codecs.base import CodecContext
from fedllm.config import RunConfig
from fedllm.models.model import Model
from fedllm.protocol import wire
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs import checkpoint
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from fedllm.tensors import Tensors
from server.rounds.engine import Engine
from server.rounds.privacy import Privacy
from server.rounds.signatures import Signatures
from server.rounds.state import ServerState
from server.rounds.timing.clock import Clock
from simulations.engines.loopback import LoopbackGrid, loopback
from strategies.averaging import Averaging, MeanAccumulator
from strategies.base import Answer, Commit, Exchange, State, Work

START: Tensors = {"a": torch.zeros(2), "b": torch.zeros(1)}
EXAMPLES = 10

Script = Callable[[int, Instruction], Reply | str | None]
"""What a client answers: a reply, a reason for failing, or silence."""


class Mean(Averaging):
    """The mean of what clients send, asked for in one exchange a round or in several, of whatever kind."""

    def __init__(self, config: RunConfig, exchanges: int = 1, kind: str = "fit") -> None:
        self.config, self.exchanges, self.kind = config, exchanges, kind
        self.closed = 0

    def build(self, labels: tuple[str, ...]) -> Model:
        raise NotImplementedError

    def run(self, work: Work) -> Answer:
        raise NotImplementedError

    def begin(self, state: State, round: int) -> MeanAccumulator:
        self.closed = -1
        return super().begin(state, round)

    def plan(self, state: State, acc: MeanAccumulator) -> Exchange | Commit:
        self.closed += 1
        return Commit() if acc.number == 0 or self.closed == self.exchanges else Exchange(self.kind)


class ScriptedGrid(LoopbackGrid):
    """Nodes whose Flower ids and numbers the script gives; each introduces itself and then plays its part."""

    numbers: Mapping[int, int]
    script: Script
    texts: Mapping[int, int]
    """How many a client says that it has, where that is not 1000."""
    asked: list[tuple[int, str]]
    """Flower ids and what they were asked, in order."""

    def introduction(self, node: int, told: Reply) -> Reply:
        """Return how a client introduces itself."""
        return told

    def get_node_ids(self) -> Iterable[int]:
        return list(self.numbers)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        while self._queue:
            message = self._queue.popleft()
            node, asked = self.numbers[message.metadata.dst_node_id], wire.unpack_instruction(message.content)
            self.asked.append((message.metadata.dst_node_id, asked.kind))
            if asked.kind == "describe":
                about = {"node": float(node), "held_out": 100.0}
                first = Reply(0, 0, self.texts.get(node, 1000), about)
                told: Reply | str | None = self.introduction(node, first)
            else:
                told = self.script(node, asked)
            if isinstance(told, Reply):
                replies.append(Message(wire.pack_reply(told), reply_to=message))
            elif told is not None:
                replies.append(Message(Error(0, told), reply_to=message))
        return replies


def scripted(**sections: Any) -> RunConfig:
    """Four clients, all asked; two rounds; the quorum is two; a missed quorum ends the run.

    Updates are of whatever length a script finds telling.
    """
    server = {"deadline_s": 5.0, "retries": 0, "norm_ratio": 0.0, **sections.pop("server", {})}
    plain = {"name": "scripted", "method": "fedavg", "clients": 4, "rounds": 2}
    return RunConfig.model_validate({**plain, "server": server, **sections})


def send(config: RunConfig, node: int, asked: Instruction, update: Tensors, **reply: Any) -> Reply:
    """Answer a question with an update, encoded as a client does that has no state yet."""
    at = (asked.round, asked.index)
    context = CodecContext(config.seed, ("up", *at, node), asked.progress)
    payload, _ = parse(config.codec.up).encode(update, {}, context)
    return Reply(*at, **{"examples": EXAMPLES, "payload": payload, **reply})


def constant(value: float) -> Tensors:
    return {name: torch.full_like(tensor, value) for name, tensor in START.items()}


def engine_of(
    config: RunConfig,
    store: RunStore,
    method: Mean | None = None,
    start: Tensors | ServerState = START,
    proven: Callable[[], Mapping[int, int]] | None = None,
    bound: Callable[[int], None] | None = None,
    evaluate: Callable[[Tensors], dict[str, float]] | None = None,
    *,
    networked: bool = False,
    privacy: Privacy | None = None,
    clock: Clock | None = None,
    signatures: Signatures | None = None,
    shared: Mapping[str, str] | None = None,
) -> Engine:
    return Engine(
        config,
        method or Mean(config),
        Codecs.of(config.codec),
        store,
        state=start if isinstance(start, ServerState) else ServerState.begin(start),
        run="scripted",
        reference_bytes=12,
        evaluate=evaluate,
        networked=networked,
        proven=proven,
        bound=bound,
        privacy=privacy,
        clock=clock,
        signatures=signatures,
        shared=shared,
    )


def play(
    config: RunConfig,
    folder: Path,
    script: Script,
    *,
    method: Mean | None = None,
    start: Tensors = START,
    texts: Mapping[int, int] | None = None,
    clock: Clock | None = None,
) -> Engine:
    """Run a script from round 0 to its end, or to what ends it; returns the engine as it was left."""
    with loopback(config.clients, {}), RunStore.create(folder, config) as store:
        engine = engine_of(config, store, method, start, clock=clock)
        engine.start(grid_of(config, script, texts=texts))
        return engine


def measured(config: RunConfig, folder: Path, accuracies: list[float], stop_in: int = 0) -> Engine:
    """Run, or go on, with these accuracies by round; ask to stop while round ``stop_in`` is under way.

    Each round adds one to every value, so a state's accuracy follows from the state.
    """

    def script(node: int, asked: Instruction) -> Reply:
        if stop_in and asked.round == stop_in and node == 0:
            Run(folder).post_command("stop", by="operator")
        return send(config, node, asked, constant(1.0))

    begun = folder.is_dir()
    chosen = Run(folder).goes_on_from if begun else None
    held = folder / "checkpoints"
    saved = checkpoint.latest(held) if chosen is None else checkpoint.load(held, chosen)
    opened = RunStore.open(folder) if begun else RunStore.create(folder, config)
    with loopback(config.clients, {}), opened as store:
        store.truncate(-1 if saved is None else saved.number)
        start = START if saved is None else ServerState.load(saved)
        engine = engine_of(
            config, store, start=start, evaluate=lambda t: {"accuracy": accuracies[int(t["a"][0])]}
        )
        engine.start(grid_of(config, script))
        return engine


def grid_of(
    config: RunConfig,
    script: Script,
    numbers: Mapping[int, int] | None = None,
    texts: Mapping[int, int] | None = None,
    kind: type[ScriptedGrid] = ScriptedGrid,
) -> ScriptedGrid:
    grid = kind(config.clients, {}, None)
    grid.numbers = numbers or {100 + node: node for node in range(config.clients)}
    grid.asked, grid.texts = [], texts or {}
    grid.script = script  # type: ignore[method-assign,assignment]
    return grid
