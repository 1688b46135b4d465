"""``fedllm bench reply_fuzz``: hostile replies through the engine; none may end, stall or bend a run.

Whole replies are mutated as bytes, or well formed and full of lies: numbers at the ends of their types,
updates scaled by up to 1e30, records of another kind, words that a terminal would obey, introductions under
impossible numbers. A round's first attempts meet them from every client that answers, too few to make a
quorum, so that the round is tried again; at the last attempt all clients are honest but the liars beside
them. The run must then hold the bits of one that never met a liar.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedllm.config import RunConfig
from fedllm.errors import WireError
from fedllm.protocol import wire
from fedllm.protocol.uplink import Uplink, Upload
from fedllm.protocol.wire import Instruction, Reply
from fedllm.randomness import stream
from fedllm.runs.reader import Run
from fedllm.runs.writer import RunStore
from fedllm.tensors import Tensors, pack
from server.rounds.admission import Proven
from server.rounds.engine import Engine
from server.rounds.state import ServerState
from simulations.bench.reply_fuzz.payloads import mutate
from simulations.engines.loopback import LoopbackGrid, loopback
from strategies import registry
from strategies.base import Exchange, Method
from strategies.fwdllm.warm_start import statistics

__all__ = ["CONFIGS", "HONEST", "LIARS", "Answerer", "conduct", "fuzz", "run"]

HONEST, LIARS = 12, 4
"""Clients whose replies make up a round's quorum, and clients that are always hostile."""

_LORA = {"method": "lora", "codec": {"up": "quantize(bits=8)"}}
CONFIGS: dict[str, dict[str, Any]] = {
    "averaged": _LORA,
    "mixed ranks": {"method": "lora", "options": {"rule": "svd", "ranks": (2, 4) * ((HONEST + LIARS) // 2)}},
    "by norm": {"method": "lora", "options": {"rule": "hetero"}},
    "estimates": {**_LORA, "codec": {"up": "ef21(top_k(fraction=0.3))", "down": "quantize(bits=8)"}},
    "slopes": {"method": "fwdllm", "options": {"directions": 3}},
    "chosen slopes": {"method": "fwdllm", "options": {"directions": 3, "candidates": 2}},
    "start": {"method": "fwdllm", "options": {"directions": 3, "warm_start": "ridge"}},
    "updates and slopes": {"method": "mixed", "options": {"directions": 3}},
    "shared directions": {"method": "mezo", "options": {"candidates": 16}},
}
"""Runs that take replies in differently; each is a row of the fuzz."""

Answerer = Callable[[Instruction, int, Reply], RecordDict | Error]
"""Makes of an instruction, a client's number and the honest answer what the client sends."""

_QUIET = 5
"""Clients that fail while the others lie, so that the lies never meet a quorum of ``HONEST``."""
_ROUNDS = 3
_RANK, _ROWS, _COLUMNS, _CLASSES, _WIDTH = 4, 24, 16, 3, 8

_NUMBERS = (0, 1, -1, 3, 99, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
_FLOATS = (0.0, -1.0, 0.5, 99.0, 1e15, 1e30, 1e100, 1e300, -1e300, float("inf"), float("nan"))
_METRICS = (
    *("node", "loss", "seconds", "peak_rss_bytes", "forward", "update_norm", "state_lost", "held_out"),
    *("accepted", "codec", "", "\x1b", "x" * 3000),
)
_SCALES = (0.0, -1.0, 1e2, 1e6, 1e20, 1e30, 3e38)
_WORDS = ("", "stale", "[/bold]", "\x1b[2J", "\x00", "x" * 5000, "A" * 2000, "\u202e\ud7ff")


def run(mutated: int = 100_000, wellformed: int = 10_000) -> dict[str, object]:
    """Send so many hostile replies of each kind through the engine; about ten minutes on one core.

    Raises:
        AssertionError: the run ended with other bits than one without them.
        Exception: whatever a reply set off.
    """
    return fuzz(mutated, wellformed)


def fuzz(
    mutated: int, wellformed: int, seed: int = 0, configs: Sequence[str] = tuple(CONFIGS)
) -> dict[str, object]:
    """Share hostile replies out among the configurations; see :func:`run`."""
    started = time.perf_counter()
    sent: Counter[str] = Counter()
    became: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    slowest = 0.0
    for place, name in enumerate(configs):
        random = np.random.Generator(np.random.Philox(seed + place))
        assault = _Assault(random, -(-mutated // len(configs)), -(-wellformed // len(configs)))
        with tempfile.TemporaryDirectory() as folder:
            honest = conduct(name, Path(folder) / "honest", _silent_liars)
            bent = conduct(name, Path(folder) / "hostile", assault.answer, assault.strangers)
            assert bent == honest, f"{name}: hostile replies changed the run: {bent} is not {honest}"
            for row in Run(Path(folder) / "hostile").nodes():
                became[row.status] += 1
                reasons[" ".join(str(row.reason).split()[:4])] += row.status == "rejected"
        sent += assault.sent
        slowest = max(slowest, assault.slowest)
    return {
        "sent": dict(sent),
        "became": dict(became),
        "rejected_for": dict(reasons.most_common(16)),
        "slowest_s": slowest,
        "seconds": time.perf_counter() - started,
    }


def conduct(
    name: str,
    folder: Path,
    answer: Answerer,
    strangers: Callable[[], list[int]] = list,
    sections: Mapping[str, Any] | None = None,
    proven: Proven | None = None,
    **server: Any,
) -> list[str | None]:
    """Conduct one of the configurations with an engine of its own, on tensors of a few hundred values.

    Args:
        name: of ``CONFIGS``.
        folder: the run folder.
        answer: what each client sends.
        strangers: Flower ids of nodes that are online besides, asked again and again.
        sections: further sections of the configuration.
        proven: which client each Flower id's key stands for; None where there are no keys.
        server: further keys of the section ``server``.

    Returns:
        SHA-256 of the global tensors after each round.
    """
    config = _config(name, server, sections or {})
    method = registry.load_method(config.method)(config)
    with RunStore.create(folder, config) as store, loopback(config.clients, {}):
        engine = Engine(
            config,
            method,
            registry.open_codecs(config),
            store,
            state=ServerState.begin(_initial(method)),
            run="fuzz",
            reference_bytes=0,
            evaluate=None,
            networked=False,
            proven=proven,
        )
        engine.start(_Stage(config, method, answer, strangers))
    return [record.state_sha256 for record in Run(folder).rounds()]


class _Stage(LoopbackGrid):
    """Clients that answer what they are told to, the newest question first."""

    def __init__(
        self, config: RunConfig, method: Method, answer: Answerer, strangers: Callable[[], list[int]]
    ) -> None:
        super().__init__(config.clients, {}, None)
        self._config, self._method, self._answer, self._strangers = config, method, answer, strangers
        self._like = _initial(method)
        self._uplink = Uplink(config, registry.open_codecs(config).up)

    def get_node_ids(self) -> Iterable[int]:
        return [*range(1, self._clients + 1), *self._strangers()]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        while self._queue:
            message = self._queue.pop()
            if message.metadata.message_id in wanted:
                node = message.metadata.dst_node_id - 1
                asked = wire.unpack_instruction(message.content)
                made = self._answer(asked, node, self._honest(asked, node))
                return [Message(made, reply_to=message)]
        return []

    def _honest(self, asked: Instruction, node: int) -> Reply:
        """Answer with what is drawn from the question alone, as a client's answer is."""
        config, at = self._config, (asked.round, asked.index)
        if asked.kind == "describe":
            return Reply(0, 0, 50 + node, {"node": float(node)}, {"platform": "stage"})
        random = stream(config.seed, "stage", *at, node)
        number = node % config.clients
        view = self._method.view(self._like, number)
        spec = self._method.expected(Exchange(asked.kind, asked.arguments), view, number)
        if asked.kind == "setup":
            answer = statistics(
                lambda rows: torch.from_numpy(random.normal(size=(len(rows), _WIDTH))),
                random.integers(_CLASSES, size=50 + node),
                spec,
            )
            return Reply(*at, 50 + node, payload=pack(answer))
        answer = {
            name: torch.from_numpy(random.normal(scale=0.01, size=item.shape).astype(np.float32))
            for name, item in sorted(spec.items())
        }
        upload = Upload(asked.kind, *at, node, asked.progress)
        sent = self._uplink.send(upload, answer, {})
        # Each of these clients begins a new estimate every time, as one does that lost its state.
        metrics = {"loss": 1.0, "seconds": 1.0, "state_lost": 1.0, "peak_rss_bytes": 2.0**30}
        return Reply(*at, 50 + node, metrics, payload=sent.payload)


class _Assault:
    """What liars send, until there were enough of each kind."""

    def __init__(self, random: np.random.Generator, mutated: int, wellformed: int) -> None:
        self.random = random
        self.sent: Counter[str] = Counter()
        self.slowest = 0.0
        each = (HONEST + LIARS - _QUIET) * _ROUNDS
        self._attempts = -(-(mutated + wellformed) // each)
        self._share = wellformed / (mutated + wellformed)
        self._strangers = 1000
        self._at: tuple[int, ...] = ()
        self._handed = 0.0

    def strangers(self) -> list[int]:
        """Two nodes more, every time somebody looks."""
        self._strangers += 2
        return [self._strangers, self._strangers + 1]

    def answer(self, asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
        """Lie, fail or be honest, as the moment requires."""
        now, at = time.process_time(), (asked.round, asked.index, asked.attempt)
        if at == self._at:
            self.slowest = max(self.slowest, now - self._handed)
        made = self._answer(asked, node, honest)
        self._at, self._handed = at, time.process_time()
        return made

    def _answer(self, asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
        introduces = asked.kind == "describe"
        if introduces and node < HONEST + LIARS:
            return wire.pack_reply(honest)
        if not introduces and asked.attempt >= self._attempts:
            return _silent_liars(asked, node, honest) if node < HONEST else self._caught(honest)
        if not introduces and node < _QUIET:
            return Error(0, "boom")
        kind = "wellformed" if self.random.random() < self._share else "mutated"
        self.sent[kind] += 1
        return self._wellformed(honest) if kind == "wellformed" else self._mutated(honest)

    def _mutated(self, honest: Reply) -> RecordDict | Error:
        """Change bytes of the payload, nine times in ten with a checksum that fits, or of the whole reply."""
        if honest.payload and self.random.random() < 0.5:
            return wire.pack_reply(replace(honest, payload=mutate(honest.payload, self.random)))
        data = bytearray(wire.encode(wire.pack_reply(honest)))
        for _ in range(self.random.integers(1, 4)):
            at, size = int(self.random.integers(len(data))), int(self.random.integers(1, 6))
            kind = self.random.integers(4)
            if kind == 0:
                data[at] ^= 1 << int(self.random.integers(8))
            elif kind == 1:
                data[at : at + size] = self.random.bytes(size)
            elif kind == 2:
                data[at : at + size] = b"\xff" * size
            else:
                data[at:at] = data[at : at + size]
        try:
            return wire.decode(bytes(data))
        except WireError as error:
            return Error(0, str(error))

    def _wellformed(self, honest: Reply) -> RecordDict | Error:
        """Keep to the format and lie in one to three places."""
        content = wire.pack_reply(honest)
        for _ in range(self.random.integers(1, 4)):
            made = self._lie(content, honest)
            if isinstance(made, Error):
                return made
        return content

    def _lie(self, content: RecordDict, honest: Reply) -> Error | None:
        pick = self._pick
        header: Any = content["h"] if isinstance(content.get("h"), ConfigRecord) else ConfigRecord()
        kind = int(self.random.integers(9))
        if kind == 0:
            at = [honest.round, honest.index, honest.examples]
            at[int(self.random.integers(3))] = pick(_NUMBERS)
            header["at"] = at
        elif kind == 1:
            metrics = {pick(_METRICS): pick(_FLOATS) for _ in range(self.random.integers(1, 80))}
            content.pop("m", None)
            content["m"] = MetricRecord({**honest.metrics, **metrics})
        elif kind == 2:
            content.pop("m", None)
            content["m"] = MetricRecord({**honest.metrics, "node": pick(_FLOATS), "seconds": pick(_NUMBERS)})
        elif kind == 3 and honest.payload:
            content.pop("p", None)
            content["p"] = _array(self._scaled(honest.payload, pick(_SCALES)))
        elif kind == 4:
            header["error"] = pick(_WORDS)
        elif kind == 5:
            content.pop("f", None)
            content["f"] = ConfigRecord({pick(_WORDS): pick(_WORDS), "log": pick(_WORDS)})
        elif kind == 6:
            name = pick(("m", "f", "p", "h", "a", "zzz"))
            content.pop(name, None)
            content[name] = pick(
                (
                    MetricRecord({"h": 1}),
                    ConfigRecord({"v": True}),
                    ArrayRecord(),
                    _array(b"", shape=(2**40,)),
                )
            )
        elif kind == 7:
            header["v"] = pick((0, 2, 1.0, "1", True, [1]))
        else:
            return Error(int(self.random.integers(500)), pick(_WORDS))
        return None

    def _pick(self, among: Sequence[Any]) -> Any:
        return among[int(self.random.integers(len(among)))]

    def _scaled(self, payload: bytes, factor: float) -> bytes:
        """Scale whatever reads as 32-bit numbers, wherever in the payload it stands."""
        shift, head = int(self.random.integers(4)), min(10, len(payload))
        body = payload[head + shift :]
        body = body[: len(body) // 4 * 4]
        with np.errstate(all="ignore"):
            values = (np.frombuffer(body, "<f4") * np.float32(factor)).astype("<f4").tobytes()
        made = bytearray(payload)
        made[head + shift : head + shift + len(values)] = values
        made[5:9] = zlib.crc32(made[9:], zlib.crc32(made[:5])).to_bytes(4, "little")
        return bytes(made)

    def _caught(self, honest: Reply) -> RecordDict | Error:
        """Lie in a way that no gate may miss, beside honest clients."""
        changes: list[dict[str, Any]] = [
            {"examples": 2**32 - 1},
            {"round": honest.round + 1},
            {"payload": b""},
            {"metrics": {"seconds": 1e300}},
            {"payload": honest.payload[:-1]},
        ]
        return wire.pack_reply(replace(honest, **changes[int(self.random.integers(len(changes)))]))


def _silent_liars(asked: Instruction, node: int, honest: Reply) -> RecordDict | Error:
    if asked.kind != "describe" and node >= HONEST:
        return Error(0, "boom")
    return wire.pack_reply(honest)


def _array(data: bytes, shape: tuple[int, ...] | None = None) -> ArrayRecord:
    return ArrayRecord({"x": Array(dtype="uint8", shape=shape or (len(data),), stype="raw", data=data)})


def _config(name: str, server: dict[str, Any], sections: Mapping[str, Any]) -> RunConfig:
    section = {"sample": HONEST + LIARS, "quorum": HONEST, "retries": 10**6, **server}
    given = RunConfig.model_validate(
        {
            "name": "fuzz",
            "clients": HONEST + LIARS,
            "rounds": _ROUNDS,
            "tuning": {"rank": _RANK},
            "server": section,
            **CONFIGS[name],
            **sections,
        }
    )
    return given.placed(deployed=True)


def _initial(method: Method) -> Tensors:
    shapes = {"head.weight": (_CLASSES, _WIDTH), "head.bias": (_CLASSES,)}
    shapes |= {
        "layer.lora_A.default.weight": (_RANK, _COLUMNS),
        "layer.lora_B.default.weight": (_ROWS, _RANK),
    }
    random = stream(0, "stage")
    return {
        name: torch.from_numpy(random.normal(scale=0.1, size=shape).astype(np.float32))
        for name, shape in sorted(shapes.items())
    }
