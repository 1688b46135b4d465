"""The uplink: how what a client answers goes up, and is read there. Both halves.

    fit                  client: clip to ``privacy.clip``, encode with ``codec.up``, keep the residual;
                         where the clip follows the updates, the exchange's argument ``clip`` says it
                         server: decode, gate, clip what is longer than a client that clipped would send
    setup, evaluate      values as they are: statistics and measurements are no updates

Both sides draw the same random numbers for an upload, by the facts that name it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedllm.codecs.base import CodecContext, Dense, FramedCodec
from fedllm.codecs.measure import relative_error
from fedllm.config import RunConfig
from fedllm.errors import WireError
from fedllm.tensors import Spec, Tensors, norm_of, pack, spec_of, unpack

__all__ = ["CLIP", "ROUNDING", "Received", "Sent", "Uplink", "Upload", "clip_of", "clipped"]

CLIP = "clip"
"""Argument of an exchange that has a clip of its own."""
ROUNDING = 1e-6
"""Share by which an update that its client clipped may come out longer: the scaling itself rounds."""


@dataclass(frozen=True)
class Upload:
    """Which upload of a run: both sides know this of it.

    Attributes:
        kind: of the exchange that is answered.
        round: of the exchange; ``index`` is its place in the round.
        node: the client's number.
        progress: share of the rounds that is done, in [0, 1).
        clip: of this exchange; None for that of the run.
    """

    kind: str
    round: int
    index: int
    node: int
    progress: float = 0.0
    clip: float | None = None

    @property
    def coded(self) -> bool:
        """Whether it is an update, which is clipped and encoded."""
        return self.kind == "fit"


@dataclass(frozen=True)
class Sent:
    """What a client makes of its answer's tensors.

    Attributes:
        payload: goes to the server.
        residuals: the codec's next state, for the client to keep.
        metrics: the update's norm before it was clipped, what the codec notes, and its relative error.
    """

    payload: bytes
    residuals: Tensors
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Received:
    """What the server makes of a payload.

    Attributes:
        tensors: as the client meant them, up to what the codec loses.
        estimate: the codec's next state of this client; empty for most codecs.
        parts: bytes by what the codec's stages wrote.
    """

    tensors: Tensors
    estimate: Tensors = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Uplink:
    """The uplink of one run.

    Attributes:
        config: the run.
        codec: of its updates.
    """

    config: RunConfig
    codec: FramedCodec

    def send(self, upload: Upload, tensors: Tensors, residuals: Tensors) -> Sent:
        """Client's half.

        Args:
            upload: which.
            tensors: of the answer.
            residuals: the codec's state after this client's newest update that counted.

        Raises:
            CodecError: an update holds what cannot be encoded, such as NaN.
        """
        if not upload.coded:
            return Sent(pack(tensors), residuals)
        norm = norm_of(tensors)
        tensors = clipped(tensors, norm, self._limit(upload))
        context = self._context(upload)
        payload, after = self.codec.encode(tensors, residuals, context)
        metrics = {"update_norm": norm, **context.notes}
        if not isinstance(self.codec, Dense):
            decoded, _ = self.codec.decode(payload, spec_of(tensors), residuals, context)
            metrics["error_up"] = relative_error(tensors, decoded)
        return Sent(payload, after, metrics)

    def receive(self, upload: Upload, payload: bytes, spec: Spec, estimate: Tensors) -> Received:
        """Server's half, but for the gates, which come next, and for :meth:`clip`, which follows them.

        Args:
            upload: which.
            payload: as it arrived.
            spec: what the answer must look like.
            estimate: the codec's state of this client after its newest update that counted.

        Raises:
            WireError: the payload is not what this client can have sent.
        """
        if not upload.coded:
            return Received(unpack(payload, spec))
        return Received(*self.codec.inspect(payload, spec, estimate, self._context(upload)))

    def clip(self, upload: Upload, tensors: Tensors, norm: float) -> Tensors:
        """Server: clip what a client did not, or what the codec made longer."""
        return clipped(tensors, norm, self._limit(upload), ROUNDING) if upload.coded else tensors

    def _limit(self, upload: Upload) -> float | None:
        return self.config.privacy.update_clip if upload.clip is None else upload.clip

    def _context(self, upload: Upload) -> CodecContext:
        path = ("up", upload.round, upload.index, upload.node)
        return CodecContext(self.config.seed, path, upload.progress)


def clip_of(arguments: Mapping[str, str | int | float | bool]) -> float | None:
    """Return the clip of an exchange with these arguments; None for that of the run.

    Raises:
        WireError: it is no length.
    """
    if CLIP not in arguments:
        return None
    clip = arguments[CLIP]
    if not isinstance(clip, float) or not 0 < clip < math.inf:
        raise WireError(f"an exchange's clip is {clip!r}, which is no length")
    return clip


def clipped(tensors: Tensors, norm: float, limit: float | None, rounding: float = 0.0) -> Tensors:
    """Scale tensors of an L2 norm down to one of ``limit``; what is no longer stays the same object.

    Args:
        tensors: of an update.
        norm: of all of them together.
        limit: norm that they may have; None for any.
        rounding: share by which they may exceed it unscaled.

    >>> import torch
    >>> clipped({"w": torch.tensor([3.0, 4.0])}, 5.0, 1.0)["w"].norm().item()
    1.0
    """
    if limit is not None and norm > limit * (1 + rounding):
        return {name: tensor * (limit / norm) for name, tensor in tensors.items()}
    return tensors
