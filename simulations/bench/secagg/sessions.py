"""A round under secure aggregation beside the plain one: bytes and seconds of a client and of the server.

Clients and server do what they do in a run, all in this process, on an update as long as quickstart's LoRA.
Bytes are those of payloads and letters, per client that stays; training, the global tensors on their way down
and Flower's envelopes, which both rounds have, are left out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedllm.codecs import CodecContext, FramedCodec, parse
from fedllm.config import RunConfig
from fedllm.randomness import derive
from fedllm.secagg import words
from fedllm.secagg.coordinator import Coordinator
from fedllm.secagg.identity import Certified, Unproven
from fedllm.secagg.letters import Masking, Unmasking
from fedllm.secagg.participant import Participant
from fedllm.secagg.ring import Ring
from fedllm.secagg.rules import Rules
from fedllm.sums import WeightedSum
from fedllm.tensors import Tensors, TensorSpec
from server.federation.provision import provision
from simulations.bench.secagg.odds import NEIGHBOURHOODS, chances

__all__ = ["ROWS", "compare", "proof", "run"]

Made = TypeVar("Made")

VALUES = 75_653
"""Of quickstart's update."""
_SPEC = {"update": TensorSpec((VALUES,))}
_SHARE = 0.667

ROWS: tuple[tuple[int, int | None, str], ...] = (
    (10, None, "none"),
    (100, None, "none"),
    (100, 50, "none"),
    (100, None, "fixed(bits=4, fraction=8)"),
    (1000, 80, "fixed(bits=4, fraction=8)"),
)
"""Clients, neighbours of each, codec."""


def run() -> dict[str, object]:
    """Hold a session for each row, a twentieth of the clients lost after they have shared: some minutes."""
    return {
        "rows": [compare(*row) for row in ROWS],
        "odds": [chances(*row) for row in NEIGHBOURHOODS],
        "proof": proof(),
    }


def proof(times: int = 50) -> dict[str, float]:
    """Measure what devices add to a session: bytes and seconds of a proof of keys, and of its check.

    Likewise of the signature under who is left, which peers are shown without the certificate once more.
    """
    with tempfile.TemporaryDirectory() as folder:
        one, other = map(Certified.read, provision(Path(folder) / "federation", "localhost", 2))
    cost, statement = _Cost(times), bytes(80)
    survivors = _Cost(times)
    for _ in range(times):
        shown = cost.client(partial(one.prove, statement))
        key = cost.server(partial(other.check, 0, statement, shown))
        signature = survivors.client(partial(one.state, statement))
        if not survivors.server(partial(other.stated, key, statement, signature)):
            raise AssertionError("a signature is not that of its own key")
    return {
        "bytes": len(shown),
        "prove_seconds": cost.client_seconds / times,
        "check_seconds": cost.server_seconds / times,
        "survivors_bytes": len(signature),
        "survivors_sign_seconds": survivors.client_seconds / times,
        "survivors_check_seconds": survivors.server_seconds / times,
    }


def compare(clients: int, neighbours: int | None, codec: str) -> dict[str, Any]:
    """Hold one session and the plain round of the same clients.

    Returns:
        Bytes and seconds of one client, and seconds of the server; raises if the sums differ.
    """
    used, config = parse(codec), RunConfig()
    kept = range(clients // 20, clients)
    plain = _plain(used, kept)
    secure = _Session(Rules(_SHARE, neighbours, 3), used, Ring.of(config, used, clients), clients, kept)
    secure.hold()
    if any(not torch.equal(value, secure.total.total()[name]) for name, value in plain.total.total().items()):
        raise AssertionError("the masked sum is not the plain one")
    return {
        "clients": clients,
        "neighbours": neighbours or clients - 1,
        "codec": codec,
        "bits": secure.ring.bits,
        "plain": plain.told(),
        "secure": secure.told(),
    }


@dataclass
class _Cost:
    """What was spent by all clients, and by the server."""

    clients: int = 0
    up: int = 0
    down: int = 0
    client_seconds: float = 0.0
    server_seconds: float = 0.0

    def client(self, work: Callable[[], Made]) -> Made:
        started = time.perf_counter()
        done = work()
        self.client_seconds += time.perf_counter() - started
        return done

    def server(self, work: Callable[[], Made]) -> Made:
        started = time.perf_counter()
        done = work()
        self.server_seconds += time.perf_counter() - started
        return done

    def told(self) -> dict[str, float]:
        """Return bytes and seconds of one client, and seconds of the server."""
        return {
            "up": self.up / self.clients,
            "down": self.down / self.clients,
            "client_seconds": self.client_seconds / self.clients,
            "server_seconds": self.server_seconds,
        }


class _Plain(_Cost):
    total: WeightedSum


def _plain(codec: FramedCodec, nodes: range) -> _Plain:
    cost, context = _Plain(len(nodes)), CodecContext()
    cost.total = WeightedSum(_SPEC)
    for node in nodes:
        update = _update(node)
        payload, _ = cost.client(partial(codec.encode, update, {}, context))
        cost.up += len(payload)
        decoded, _ = cost.server(partial(codec.decode, payload, _SPEC, {}, context))
        cost.server(partial(cost.total.add, decoded, 1))
    return cost


class _Vault:
    content: bytes | None = None

    def load(self) -> bytes | None:
        return self.content

    def save(self, content: bytes) -> None:
        self.content = content


class _Session(_Cost):
    """A session of clients that count alike; all but those kept leave before they send masked values."""

    def __init__(self, rules: Rules, codec: FramedCodec, ring: Ring, clients: int, kept: range) -> None:
        super().__init__(len(kept))
        self.codec, self.ring, self.kept = codec, ring, kept
        self.people = {node: Participant(node, rules, Unproven(), _Vault()) for node in range(clients)}
        self.session, self.total = Coordinator(rules, "bench/1/0"), WeightedSum(_SPEC)

    def hold(self) -> None:
        """Go through all four steps."""
        session, people = self.session, self.people
        context = session.context
        for node, one in people.items():
            self._pass(b"", partial(_begin, one, context), session.take_keys, node)
        for node, one in people.items():
            self._pass(self.server(session.roster), partial(one.shares, context), session.take_shares, node)
        for node in self.kept:
            letter = self.server(partial(session.masking, node, 1, len(people)))
            self._pass(letter, partial(self._masked, node), self._take_masked, node)
        for node in self.kept:
            letter = self.server(partial(session.unmasking, node))
            self._pass(letter, partial(self._unmask, node), session.take_unmasking, node)
        summed = self.server(session.total)
        self.total.add_total(
            self.ring.tensors(summed, _SPEC), self.ring.fraction, len(self.kept), len(self.kept)
        )

    def _pass(
        self, letter: bytes, answer: Callable[[bytes], bytes], take: Callable[[int, bytes], None], node: int
    ) -> None:
        payload = self.client(lambda: answer(letter))
        self.down += len(letter)
        self.up += len(payload)
        self.server(lambda: take(node, payload))

    def _masked(self, node: int, letter: bytes) -> bytes:
        payload, _ = self.codec.encode(_update(node), {}, CodecContext())
        decoded, _ = self.codec.decode(payload, _SPEC, {}, CodecContext())
        given = words.words_of(self.ring.integers(decoded, 1), self.ring.bits)
        masked = self.people[node].mask(self.session.context, Masking.read(letter), given, self.ring.bits)
        return words.pack(masked, self.ring.bits)

    def _unmask(self, node: int, letter: bytes) -> bytes:
        return self.people[node].unmask(self.session.context, Unmasking.read(letter))

    def _take_masked(self, node: int, payload: bytes) -> None:
        self.session.take_masked(node, payload, VALUES, self.ring.bits)


def _begin(one: Participant, context: str, letter: bytes) -> bytes:
    return one.keys(context)


def _update(node: int) -> Tensors:
    generator = torch.Generator().manual_seed(derive(0, "bench", node) % 2**63)
    return {"update": 1e-2 * torch.randn(VALUES, generator=generator)}
