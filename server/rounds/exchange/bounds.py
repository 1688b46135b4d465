"""What replies to the next exchange may count for, from what the run has shown so far; see :mod:`.gates`."""

from __future__ import annotations

import math

from fedllm.codecs import Codecs, growth
from fedllm.config import RunConfig
from fedllm.runs.writer import RunStore
from server.rounds import gates
from server.rounds.roster import Roster
from server.rounds.round_log import RoundLog
from server.rounds.state import ServerState
from strategies.base import Method

__all__ = ["Bounds"]

_AT_MOST = "server.max_update_norm; raise it if honest updates are longer"


class Bounds:
    """Bounds what any one reply to the next exchange can do, and says whom that bounds.

    Args:
        config: the run.
        method: knows how long an update is before any was seen.
        codecs: of the uplink, which may lengthen updates.
        roster: knows how many texts each client has declared.
        state: knows how long updates usually were.
        store: is told of clients that count for less than they have, and of outliers.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        codecs: Codecs,
        roster: Roster,
        state: ServerState,
        store: RunStore,
    ) -> None:
        self._server, self._method, self._codec = config.server, method, codecs.up
        self._noised = config.privacy.noised
        self._roster, self._state, self._store = roster, state, store
        self._outweighed: set[int] = set()
        """Clients of which it was told."""

    def next(self, number: int) -> gates.Limits:
        """Return the limits of the next exchange of a round."""
        declared = self._roster.declared
        server, usual = self._server, self._state.usual
        if self._noised:  # what others have sent decides nothing, and all count alike
            return gates.Limits(1, server.max_update_norm or math.inf, _AT_MOST)
        far = usual.far(server.outlier_deviations) if server.outliers == "reject" else None
        found = gates.limits(server, declared.values(), *self._expected(), far)
        bounded = {node for node, texts in declared.items() if texts > found.examples}
        if fresh := sorted(bounded - self._outweighed):
            self._outweighed |= bounded
            sentence = gates.outweighed(found.examples, {node: declared[node] for node in fresh})
            self._store.event("warning", sentence, round=number, nodes=fresh)
        return found

    def name_outliers(self, log: RoundLog) -> None:
        """Name whose updates were far longer than the recent rounds', this one among them."""
        far = self._state.usual.far(self._server.outlier_deviations)
        rows = [row for row in log.nodes if row.attempt == log.attempt and row.exchange == "fit"]
        found = {
            row.node: f"is {row.update_norm:.4g} long, far outside of recent rounds, which end at {far:.4g}"
            for row in rows
            if far is not None and row.update_norm is not None and row.update_norm > far
        }
        found |= {
            row.node: f"was rejected: {row.reason}" for row in rows if gates.OUTLIER in (row.reason or "")
        }
        for node, said in sorted(found.items()):
            self._store.event("outlier", f"client {node}'s update {said}", round=log.number, node=node)

    def _expected(self) -> tuple[float | None, str]:
        """How long the next updates may be expected to be, as they are decoded, and what that length is."""
        usual, tensors = self._state.usual, self._state.current.tensors
        if usual.known:
            return usual.norm, "usual"
        stride = self._method.stride(tensors)
        if stride is None:
            return None, ""
        expected = stride * growth(self._codec, self._method.updates(tensors))
        return (usual.norm, "usual") if usual.norm > expected else (expected, "expected")
