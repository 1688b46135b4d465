"""The downlink: which bytes bring which node to the current global tensors.

A commit that clients can repeat - decoded from ``codec.down``, or replayed from a method's record - is kept
as an increment. A node that is a few versions behind gets those increments or the whole tensors, whichever
is smaller. The server itself holds what clients decode, so both sides have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedllm.codecs.base import Dense, FramedCodec
from fedllm.codecs.measure import relative_error
from fedllm.config import RunConfig
from fedllm.protocol.increments import ENCODED, REPLAYED, context
from fedllm.protocol.wire import DENSE
from fedllm.tensors import Tensors, dense_bytes, pack, spec_of
from server.rounds.state import Sent
from strategies.base import Method, Replay

__all__ = ["Downlink"]


@dataclass
class Downlink:
    """The server's half: which bytes bring which node to the current version.

    Attributes:
        sent: increments kept, and the version each node has acknowledged.
        parts: bytes of the newest increment by what the codec's stages wrote; empty without a codec.
        error: of the newest increment, against the update it stands for; ``None`` without a codec.
    """

    config: RunConfig
    codec: FramedCodec
    method: Method
    sent: Sent = field(default_factory=Sent)
    parts: Mapping[str, int] = field(default_factory=dict)
    error: float | None = None

    def commit(
        self, version: int, tensors: Tensors, proposal: Tensors | Replay, residual: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Turn a method's proposal into the next version, as clients will decode it.

        Args:
            version: of ``tensors``, the current global tensors.
            tensors: the current global tensors.
            proposal: the next ones, or a replay record that leads to them.
            residual: what the codec left out of earlier versions; empty at first.

        Returns:
            The next global tensors and the next residual.
        """
        if isinstance(proposal, Replay):
            self._keep(REPLAYED + proposal.record, version, tensors)
            return self.method.replay(tensors, proposal.record), residual
        if isinstance(self.codec, Dense):
            self.sent.increments, self.sent.first = [], version + 1
            return proposal, residual
        update = {name: proposal[name] - old for name, old in tensors.items()}
        told = context(self.config, version)
        payload, residual = self.codec.encode(update, residual, told)
        self._keep(ENCODED + payload, version, tensors)
        decoded, _, self.parts = self.codec.inspect(payload, spec_of(tensors), {}, told)
        self.error = relative_error(update, decoded)
        return {name: old + decoded[name] for name, old in tensors.items()}, residual

    def payload(self, node: int, version: int, tensors: Tensors) -> tuple[int, tuple[int, ...], bytes]:
        """Return ``start``, ``sizes`` and the payload that bring ``node`` to ``version``."""
        known = self.sent.known.get(node)
        if known == version:
            return version, (), b""
        if known is not None and known >= self.sent.first:
            behind = self.sent.increments[known - self.sent.first :]
            if behind and sum(map(len, behind)) < dense_bytes(spec_of(tensors)):
                return known, tuple(map(len, behind)), b"".join(behind)
        whole = pack(self.method.view(tensors, node))
        return DENSE, (len(whole),), whole

    def _keep(self, increment: bytes, version: int, tensors: Tensors) -> None:
        if not self.sent.increments:
            self.sent.first = version
        self.sent.increments.append(increment)
        # Increments that add up to more than the whole tensors would never be sent.
        dense = dense_bytes(spec_of(tensors))
        while len(self.sent.increments) > 1 and sum(map(len, self.sent.increments)) >= dense:
            self.sent.increments.pop(0)
            self.sent.first += 1
