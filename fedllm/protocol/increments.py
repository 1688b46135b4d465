"""Increments: how a client that holds one version of the global tensors comes to a later one.

An increment is what ``codec.down`` encoded, or a method's record of a step that clients can repeat. Both ends
take it the same way, so both hold the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from fedllm.codecs.base import CodecContext, FramedCodec
from fedllm.config import RunConfig
from fedllm.errors import WireError
from fedllm.protocol.wire import DENSE, Instruction
from fedllm.tensors import Tensors, spec_of, unpack

__all__ = ["ENCODED", "REPLAYED", "context", "receive"]

ENCODED, REPLAYED = b"c", b"r"
"""First byte of an increment: decoded from ``codec.down``, or replayed from a method's record."""


def context(config: RunConfig, version: int) -> CodecContext:
    """Return what ``codec.down`` is told about the step from ``version`` to the next."""
    return CodecContext(config.seed, ("down", version), min(version / config.rounds, 1.0))


def receive(
    instruction: Instruction,
    held: Tensors | None,
    initial: Tensors,
    config: RunConfig,
    codec: FramedCodec,
    replay: Callable[[Tensors, bytes], Tensors],
) -> Tensors | None:
    """Client's half: the global tensors of ``instruction.base``.

    Args:
        instruction: names the version and carries the payload.
        held: this node's view of version ``instruction.start``, or ``None`` if it has lost it.
        initial: the view that this node derives for itself; its spec bounds the payload.
        config: the run.
        codec: of the downlink.
        replay: takes a step of the method from its record.

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
        increment = instruction.payload[offset : offset + length]
        held = _apply(increment, instruction.start + step, held, config, codec, replay)
        offset += length
    return held


def _apply(
    increment: bytes,
    version: int,
    tensors: Tensors,
    config: RunConfig,
    codec: FramedCodec,
    replay: Callable[[Tensors, bytes], Tensors],
) -> Tensors:
    """Take the step from ``version`` to the next, the same on both sides."""
    tag, body = increment[:1], increment[1:]
    if tag == REPLAYED:
        return replay(tensors, body)
    if tag != ENCODED:
        raise WireError(f"unknown kind of increment {tag!r}")
    update, _ = codec.decode(body, spec_of(tensors), {}, context(config, version))
    return {name: old + update[name] for name, old in tensors.items()}
