"""What one round leaves behind: every byte that crossed and what became of every client."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flwr.app import RecordDict

from fedllm.protocol import wire
from fedllm.runs.ledger import Direction, Entry
from fedllm.runs.provenance.chain import Sent
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.runs.summary import SIMULATED

__all__ = ["RoundLog", "forward_passes"]

_OWN_COLUMNS = {"loss", "seconds", "update_norm", "peak_rss_bytes", "forward", "backward", wire.ONCE}


def forward_passes(told: Mapping[str, float], *, kept: bool) -> float:
    """Return the forward passes behind a reply; those that are made once not, where their outcome was kept.

    >>> told = {"forward": 3.0, "forward_once": 2.0}
    >>> forward_passes(told, kept=False), forward_passes(told, kept=True)
    (3.0, 1.0)
    """
    return told.get("forward", 0.0) - (told.get(wire.ONCE, 0.0) if kept else 0.0)


@dataclass
class RoundLog:
    """Collects entries and rows while a round runs, over all its attempts.

    Attributes:
        number: the round; 0 is what comes before the first.
        attempt: attempts that missed their quorum so far.
        networked: whether messages cross a network; in a simulation they only wait for their turn.
        kept: clients that have what their forward passes make once in a run.
        simulated: seconds after which each client's device answered in the open exchange, if simulated.
        replies: what the run's chain keeps of each reply that counts, of this attempt.
        lack: what kept a secure sum from being opened, in this attempt.
        codec_up: bytes of uploads by what the codec's stages wrote: header, scales, codes, indices, ...
    """

    number: int
    attempt: int = 0
    networked: bool = True
    entries: list[Entry] = field(default_factory=list)
    nodes: list[NodeRound] = field(default_factory=list)
    replies: list[Sent] = field(default_factory=list)
    lack: str = ""
    codec_up: Counter[str] = field(default_factory=Counter)
    kept: set[int] = field(default_factory=set)
    simulated: dict[int, float] = field(default_factory=dict)
    forward: float = 0.0
    backward: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _sent: dict[int, float] = field(default_factory=dict)

    def asked_before(self, node: int, at: float) -> None:
        """Note when a client was asked that is at work since an earlier round; monotonic, of this host."""
        self._sent[node] = at

    def begin(self) -> None:
        """Start the clock: clients may have introduced themselves long before."""
        self._started = time.monotonic()

    def crossed(
        self,
        direction: Direction,
        node: int,
        kind: str,
        content: RecordDict,
        *,
        payload: int,
        dense: int | None,
    ) -> None:
        """Count one message.

        Args:
            direction: ``up`` or ``down``.
            node: the client's number.
            kind: of the exchange.
            content: what is serialized.
            payload: bytes of the payload within it.
            dense: bytes that the payload would have as uncompressed fp32, if it stands for tensors.
        """
        if direction == "down":
            self._sent[node] = time.monotonic()
        parts = wire.sizes(content)
        if dense is not None:
            parts.setdefault("payload", 0)
        for record, size in parts.items():
            whole = size - payload + dense if dense is not None and record == "payload" else None
            self.entries.append(Entry(self.number, node, direction, kind, record, size, whole))

    def outcome(
        self,
        node: int,
        kind: str,
        status: Literal["accepted", "late", "failed", "rejected", "unused"],
        *,
        reason: str | None = None,
        examples: int = 0,
        metrics: Mapping[str, float] | None = None,
        update_norm: float | None = None,
    ) -> None:
        """Note what became of one client in one exchange; ``update_norm`` is measured, not what it told."""
        told = dict(metrics or {})
        if node in self.simulated:
            told[SIMULATED] = self.simulated[node]
        compute = told.get("seconds", 0.0)
        elapsed = time.monotonic() - self._sent.get(node, time.monotonic())
        timed = self.networked and status == "accepted"
        self.forward += forward_passes(told, kept=node in self.kept)
        self.backward += told.get("backward", 0.0)
        self.nodes.append(
            NodeRound(
                round=self.number,
                node=node,
                status=status,
                attempt=self.attempt,
                exchange=kind,
                reason=reason,
                examples=examples,
                loss=told.get("loss"),
                compute_seconds=compute,
                transfer_seconds=max(elapsed - compute, 0.0) if timed else 0.0,
                update_norm=update_norm,
                peak_rss_bytes=int(told.get("peak_rss_bytes", 0.0)),
                metrics={key: value for key, value in told.items() if key not in _OWN_COLUMNS},
            )
        )

    @property
    def last_reason(self) -> str:
        """Why the last reply that did not count did not, or the sum of all did not."""
        return self.lack or next(
            (row.reason for row in reversed(self.nodes) if row.reason), "no client was there"
        )

    def record(
        self,
        *,
        metrics: Mapping[str, float],
        reference_bytes: int,
        state_sha256: str,
        details: dict[str, Any],
        rss: int,
    ) -> RoundRecord:
        """Sum the round up; ``rss`` is the server's own peak."""
        others = ("evaluate", *wire.SESSION)
        worked = [row for row in self.nodes if row.exchange not in others and row.attempt == self.attempt]
        return RoundRecord(
            round=self.number,
            attempt=self.attempt,
            metrics=metrics,
            seconds=time.monotonic() - self._started,
            client_compute=sum(row.compute_seconds for row in self.nodes),
            participants=len({row.node for row in worked if row.status == "accepted"}),
            failures=sum(row.status in ("failed", "late") for row in self.nodes),
            rejected=sum(row.status == "rejected" for row in self.nodes),
            peak_rss_bytes=max([rss, *(row.peak_rss_bytes for row in self.nodes)]),
            forward=self.forward,
            backward=self.backward,
            reference_bytes=reference_bytes,
            state_sha256=state_sha256,
            details=details,
        )
