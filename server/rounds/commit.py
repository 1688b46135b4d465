"""From what a round has folded to the next global tensors: noise, method, server optimiser, downlink."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.config import RunConfig
from fedllm.protocol.uplink import CLIP
from fedllm.protocol.wire import Reply
from server.rounds import optimizers
from server.rounds.exchange.downlink import Downlink
from server.rounds.privacy import Privacy
from server.rounds.state import ServerState
from strategies.base import Method, State
from strategies.private import FixedSum

__all__ = ["Committer"]


@dataclass
class Committer:
    """What ends a round.

    Attributes:
        privacy: of a run whose rounds release sums with noise; None of all others.
    """

    config: RunConfig
    method: Method
    downlink: Downlink
    state: ServerState
    privacy: Privacy | None

    @property
    def clip(self) -> float:
        """The next round's clip; infinite where there is none."""
        return self.state.clip or self.config.privacy.clip or math.inf

    def commit(self, number: int, acc: Any, accepted: Mapping[int, Reply]) -> dict[str, Any]:
        """Take the step; return the method's report, and what encoding it for clients left out.

        Args:
            number: of the round.
            acc: what the method has folded.
            accepted: the replies that count, by client.

        Raises:
            RunFailed: the step changes nothing, or leads to values that are not finite.
            Spent: the budget of privacy does not allow it; nothing was changed.
        """
        kept, state = self.state, self.state.current
        report = {} if self.privacy is None else self._release(self.privacy, number, acc, accepted)
        step = self.method.step(state, acc)
        proposal, moments = step.proposal, kept.moments
        if isinstance(proposal, dict):
            proposal, moments = optimizers.advance(self.config.server, state.tensors, proposal, moments)
        tensors, residual = self.downlink.commit(state.version, state.tensors, proposal, kept.residual)
        # What a lossy downlink holds back for later rounds is no standstill.
        optimizers.require_change(state.tensors, proposal if isinstance(proposal, dict) else tensors, number)
        kept.current = State(state.version + 1, tensors, step.memory)
        kept.moments, kept.residual = moments, residual
        missing = {} if self.downlink.error is None else {"error_down": self.downlink.error}
        return {**report, **step.report, **missing}

    def _release(
        self, privacy: Privacy, number: int, acc: Any, accepted: Mapping[int, Reply]
    ) -> dict[str, float]:
        """Add the noise to a round's sum; where the clip follows the updates, return what it was."""
        total, clip = self.method.summed(acc), self.clip
        assert isinstance(total, FixedSum)
        unclipped = sum(reply.metrics.get("update_norm", math.inf) <= clip for reply in accepted.values())
        after = privacy.release(number, total, clip, unclipped)
        if self.config.privacy.clip_quantile is None:
            return {}
        self.state.clip = after
        return {CLIP: clip}
