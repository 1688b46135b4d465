"""A client's side of secure aggregation: what it says in a session, and its answer masked.

Keys and shares of the newest session lie in the node's folder, for its user alone, and are gone once it has
ended or another has begun: messages of one session may meet different processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from flwr.app import RecordDict

from client.node import NodeContext
from client.secret import Secret
from fedllm.certificates import peers_in
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, WireError
from fedllm.protocol import wire
from fedllm.protocol.uplink import Uplink, Upload
from fedllm.protocol.wire import Instruction, Reply
from fedllm.runs.durable import replace_file
from fedllm.secagg import words
from fedllm.secagg.identity import Certified, Identity, Unproven
from fedllm.secagg.letters import NONCE_BYTES, Masking, Unmasking
from fedllm.secagg.participant import Participant
from fedllm.secagg.ring import Ring
from fedllm.secagg.rules import Rules, task
from strategies.base import Exchange
from strategies.session import Session

__all__ = ["STARTED", "answer", "masked", "require_masked", "require_session"]

STARTED = "started"
"""The fact by which a client remembers from which tensors, by their SHA-256, an answer of its own started."""

_TOLD = ("seconds", "forward", "backward", "peak_rss_bytes", "state_lost", "epsilon", "delta", wire.ONCE)
"""What a masked answer still tells of itself: what it cost, in privacy as well. How well it went is of this
client alone."""


@dataclass(frozen=True)
class _File:
    """A vault in a node's folder."""

    path: Path

    def load(self) -> bytes | None:
        return self.path.read_bytes() if self.path.exists() else None

    def save(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(self.path, content, mode=0o600)


def require_masked(config: RunConfig, place: NodeContext) -> None:
    """Refuse a run in which the server would see this device's update, where its owner wants none.

    Raises:
        ConfigError: it is such a run; or one under secure aggregation, and the device cannot prove its keys.
    """
    if config.privacy.secure_aggregation:
        _identity(place)
    elif place.secure_only or place.peers:
        option = "--peers" if place.peers else "--secure-only"
        raise ConfigError(
            f"this device was started with {option}, and the run has no privacy.secure_aggregation = true"
        )


def require_session(instruction: Instruction) -> None:
    """Answer nothing in the clear where answers are to be masked."""
    if instruction.kind != "fit" or not instruction.session:
        raise WireError(
            f"asked for {instruction.kind!r} outside of a session of secure aggregation, in a run with "
            "privacy.secure_aggregation = true: this client answers nothing so"
        )


def answer(config: RunConfig, place: NodeContext, instruction: Instruction) -> RecordDict:
    """Answer one of the steps around the method's own."""
    one, told = _participant(config, place, instruction.run), instruction.session[NONCE_BYTES:]
    context = _context(instruction)
    if instruction.kind == "keys":
        payload = one.keys(context)
    elif instruction.kind == "shares":
        payload = one.shares(context, told)
    elif instruction.kind == "agree":
        payload = one.agree(context, told)
    else:
        payload = one.unmask(context, Unmasking.read(told))
    return wire.pack_reply(Reply(instruction.round, instruction.index, payload=payload))


def masked(session: Session, place: NodeContext, instruction: Instruction, reply: Reply) -> RecordDict:
    """Mask an answer: the values that the server would have decoded, weighted, as integers of a ring."""
    config, codec, method = session.config, session.codecs.up, session.method
    view = method.view(session.initial, place.node)
    spec = method.expected(Exchange(instruction.kind, instruction.arguments), view, place.node)
    at = (instruction.round, instruction.index)
    upload = Upload(instruction.kind, *at, place.node, instruction.progress)
    tensors = Uplink(config, codec).receive(upload, reply.payload, spec, {}).tensors
    letter = Masking.read(instruction.session[NONCE_BYTES:])
    ring = Ring.of(config, codec, letter.weight)
    if config.privacy.noised:
        key = partial(Secret.of(place, instruction.run).key, "sum", *at)
        values = ring.private(ring.integers(tensors, 1), key)
    else:
        values = ring.integers(tensors, min(reply.examples, letter.most))
    given = words.words_of(values, ring.bits)
    if STARTED not in reply.facts:
        raise WireError(
            "this client's answer was kept by an older fedllm, which masked otherwise: begin a new run"
        )
    told = task(
        config.placed(deployed=place.on_device).to_json(),
        instruction.kind,
        instruction.arguments,
        instruction.progress,
        reply.facts[STARTED],
        letter.most,
        letter.weight,
    )
    one, context = _participant(config, place, instruction.run), _context(instruction)
    drawn = one.mask(context, letter, given, ring.bits, told)
    metrics = {name: value for name, value in reply.metrics.items() if name in _TOLD}
    facts = {wire.TASK: told.hex()}
    return wire.pack_reply(replace(reply, metrics=metrics, facts=facts, payload=words.pack(drawn, ring.bits)))


def _participant(config: RunConfig, place: NodeContext, run: str) -> Participant:
    file = _File(Path(place.folder) / run / "secure.json")
    return Participant(place.node, Rules.of(config), _identity(place), file)


def _identity(place: NodeContext) -> Identity:
    """Return what proves a device's keys; clients of a simulation have none of their own."""
    if not place.on_device:
        return Unproven()
    if not place.bundle:
        raise ConfigError(
            "privacy.secure_aggregation = true needs nodes whose keys the server cannot make, and this one "
            "was started with --insecure"
        )
    own = _read_identity(Path(place.bundle))
    # Read each time: whoever was struck off the list is no peer from then on.
    return replace(own, peers=peers_in(Path(place.peers), own.authority)) if place.peers else own


@lru_cache(maxsize=1)
def _read_identity(bundle: Path) -> Certified:
    return Certified.read(bundle)


def _context(instruction: Instruction) -> str:
    """Name the session that an instruction belongs to."""
    nonce = instruction.session[:NONCE_BYTES]
    if len(nonce) != NONCE_BYTES:
        raise WireError("a session of secure aggregation has no nonce")
    return f"{instruction.run}/{instruction.round}/{instruction.index}/{nonce.hex()}"
