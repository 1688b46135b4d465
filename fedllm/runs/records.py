"""The records of a run: its rounds, its clients' answers, its log, and its operator's wishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["CHECKING", "FILE", "OWN", "TEXTS", "Command", "Event", "NodeLog", "NodeRound", "RoundRecord"]

FILE = "run.db"
"""Where they are kept; a folder that holds it holds a run."""
CHECKING = "checking"
"""The phase in which a second base is loaded: whoever finds it left behind knows what ended the process."""


TEXTS, OWN = "texts", "own"
"""What a client that joins says of its texts, and that they are its own: no others than it know of them."""


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One committed round; round 0 is the starting point, and the setup before the first where there is one.

    Attributes:
        round: number from 0.
        attempt: attempts at this round that missed their quorum before this one.
        metrics: on the server's test set (``accuracy``, ``loss``, ``perplexity``); empty where not evaluated.
        seconds: wall time of the round, evaluation included.
        client_compute: seconds that clients spent computing, summed over clients.
        participants: clients whose reply counted; none in round 0 where there is no setup.
        failures, rejected: replies that never came or said they failed, and replies that failed a gate.
        peak_rss_bytes: largest resident set of any process that took part.
        forward, backward: batches that went through the whole model.
        reference_bytes: what FedAvg of the whole model in fp32 would have moved, both ways; up only in
            round 1, since everybody has the pretrained model already.
        epsilon, delta: privacy spent since the start of the run.
        state_sha256: hash of the global trainable tensors after the round.
        details: the method's own facts (ranks, directions, energy threshold, variance).
        bytes_up, bytes_down: filled in by the store from the ledger.
        finished_at: Unix time, filled in by the store.
    """

    round: int
    attempt: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    client_compute: float = 0.0
    participants: int = 0
    failures: int = 0
    rejected: int = 0
    peak_rss_bytes: int = 0
    forward: float = 0.0
    backward: float = 0.0
    reference_bytes: int = 0
    epsilon: float | None = None
    delta: float | None = None
    state_sha256: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    finished_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class NodeRound:
    """What became of one client in one exchange of one round.

    Attributes:
        round, attempt, exchange: which exchange; ``exchange`` is its kind.
        node: the client's number in the federation.
        status: ``accepted``, ``late``, ``failed``, ``rejected``, or ``unused`` (over-selected, not needed).
        reason: one sentence where the reply did not count.
        examples: texts the client trained or evaluated on.
        loss: the client's mean training loss.
        compute_seconds, transfer_seconds: on the client, and between the two (0 in a simulation).
        update_norm: L2 norm of the decoded update.
        peak_rss_bytes: the client's resident set.
        metrics: further numbers that the client reported.
    """

    round: int
    node: int
    status: Literal["accepted", "late", "failed", "rejected", "unused"]
    attempt: int = 0
    exchange: str = "fit"
    reason: str | None = None
    examples: int = 0
    loss: float | None = None
    compute_seconds: float = 0.0
    transfer_seconds: float = 0.0
    update_norm: float | None = None
    peak_rss_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something worth a line in the log: ``kind`` for machines, ``message`` for people."""

    id: int = 0
    at: float
    kind: str
    message: str
    round: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A wish of the operator, such as ``pause``, ``resume`` or ``stop``, taken by the run between rounds."""

    id: int = 0
    at: float
    kind: str
    by: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NodeLog:
    """Lines of a node's own log, as they came with one of its replies."""

    id: int = 0
    at: float
    round: int
    node: int
    lines: str
