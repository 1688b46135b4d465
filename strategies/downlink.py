"""The downlink: which bytes bring which node to the current global tensors.

A commit that clients can repeat - decoded from ``codec.down``, or replayed from a method's record - is kept
as an increment. A node that is a few versions behind gets those increments or the whole tensors, whichever
is smaller. The server itself holds what clients decode, so both sides have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedllm.codecs import parse
from fedllm.codecs.base import CodecContext
from fedllm.codecs.measure import relative_error
from fedllm.config import RunConfig
from fedllm.errors import WireError
from fedllm.tensors import Tensors, dense_bytes, pack, spec_of, unpack
from fedllm.wire import DENSE, Instruction
from strategies.base import Method, Replay

__all__ = ["Downlink", "receive"]

_ENCODED, _REPLAYED = b"c", b"r"
_FEEDBACK = "down/"


@dataclass
class Downlink:
    """The server's half: increments kept, and the version each node has acknowledged.

    Attributes:
        first: version that the oldest kept increment starts from.
        increments: one per version from ``first`` on; the last leads to the current version.
        known: newest version that each node has confirmed to hold; absent means unknown.
        parts: bytes of the newest increment by what the codec's stages wrote; empty without a codec.
        error: of the newest increment, against the update it stands for; ``None`` without a codec.
    """

    config: RunConfig
    method: Method
    first: int = 0
    increments: list[bytes] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    error: float | None = None

    def commit(
        self, version: int, tensors: Tensors, proposal: Tensors | Replay, memory: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Turn a method's proposal into the next version, as clients will decode it.

        Args:
            version: of ``tensors``, the current global tensors.
            tensors: the current global tensors.
            proposal: the next ones, or a replay record that leads to them.
            memory: the server's memory; holds the downlink's feedback state under ``down/``.

        Returns:
            The next global tensors and the next memory.
        """
        if isinstance(proposal, Replay):
            self._keep(_REPLAYED + proposal.record, version, tensors)
            return self.method.replay(tensors, proposal.record), memory
        if self.config.codec.down == "none":
            self.increments, self.first = [], version + 1
            return proposal, memory
        codec = parse(self.config.codec.down)
        feedback = {k.removeprefix(_FEEDBACK): v for k, v in memory.items() if k.startswith(_FEEDBACK)}
        rest = {k: v for k, v in memory.items() if not k.startswith(_FEEDBACK)}
        update = {name: proposal[name] - old for name, old in tensors.items()}
        context = _context(self.config, version)
        payload, feedback = codec.encode(update, feedback, context)
        self._keep(_ENCODED + payload, version, tensors)
        decoded, _, self.parts = codec.inspect(payload, spec_of(tensors), {}, context)
        self.error = relative_error(update, decoded)
        after = {name: old + decoded[name] for name, old in tensors.items()}
        return after, rest | {_FEEDBACK + name: value for name, value in feedback.items()}

    def payload(self, node: int, version: int, tensors: Tensors) -> tuple[int, tuple[int, ...], bytes]:
        """Return ``start``, ``sizes`` and the payload that bring ``node`` to ``version``."""
        known = self.known.get(node)
        if known == version:
            return version, (), b""
        if known is not None and known >= self.first:
            behind = self.increments[known - self.first :]
            if behind and sum(map(len, behind)) < dense_bytes(spec_of(tensors)):
                return known, tuple(map(len, behind)), b"".join(behind)
        whole = pack(self.method.view(tensors, node))
        return DENSE, (len(whole),), whole

    def _keep(self, increment: bytes, version: int, tensors: Tensors) -> None:
        if not self.increments:
            self.first = version
        self.increments.append(increment)
        # Increments that add up to more than the whole tensors would never be sent.
        dense = dense_bytes(spec_of(tensors))
        while len(self.increments) > 1 and sum(map(len, self.increments)) >= dense:
            self.increments.pop(0)
            self.first += 1


def receive(
    instruction: Instruction, held: Tensors | None, initial: Tensors, config: RunConfig, method: Method
) -> Tensors | None:
    """Client's half: the global tensors of ``instruction.base``.

    Args:
        instruction: names the version and carries the payload.
        held: this node's view of version ``instruction.start``, or ``None`` if it has lost it.
        initial: the view that this node derives for itself; its spec bounds the payload.
        config: the run.
        method: takes replayed steps.

    Returns:
        The tensors, or ``None`` if the increments start from a version that is not held.
    """
    if instruction.start == DENSE:
        return unpack(instruction.payload, spec_of(initial))
    if held is None:
        return None
    if instruction.start + len(instruction.sizes) != instruction.base:
        raise WireError(
            f"{len(instruction.sizes)} increments from version {instruction.start} "
            f"do not lead to {instruction.base}"
        )
    offset = 0
    for step, length in enumerate(instruction.sizes):
        version = instruction.start + step
        increment = instruction.payload[offset : offset + length]
        held = _apply(increment, version, held, config, method)
        offset += length
    return held


def _apply(increment: bytes, version: int, tensors: Tensors, config: RunConfig, method: Method) -> Tensors:
    """Take the step from ``version`` to the next, the same on both sides."""
    tag, body = increment[:1], increment[1:]
    if tag == _REPLAYED:
        return method.replay(tensors, body)
    if tag != _ENCODED:
        raise WireError(f"unknown kind of increment {tag!r}")
    update, _ = parse(config.codec.down).decode(body, spec_of(tensors), {}, _context(config, version))
    return {name: old + update[name] for name, old in tensors.items()}


def _context(config: RunConfig, version: int) -> CodecContext:
    return CodecContext(config.seed, ("down", version), min(version / config.rounds, 1.0))
