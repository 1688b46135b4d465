"""``summary.json``, schema 1: a run in one document whose keys never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fedllm.config import RunConfig
from fedllm.ledger import Ledger
from fedllm.run_database import Round

__all__ = ["Status", "round_line", "summarise"]

Status = Literal["running", "finished", "failed", "stopped"]


def summarise(
    config: RunConfig,
    rounds: Sequence[Round],
    ledger: Ledger,
    *,
    status: Status,
    seconds: float,
    workers: int = 1,
    wire_up: int | None = None,
    wire_down: int | None = None,
) -> dict[str, Any]:
    """Say what a run did, in the keys of schema 1; what does not apply is None.

    Args:
        config: the run's configuration.
        rounds: committed rounds, ascending; round 0 is the setup.
        ledger: every byte that crossed.
        status: how the run stands.
        seconds: wall time of the run, over all its sessions.
        workers: clients that computed at the same time.
        wire_up: bytes that a deployed transport counted, client to server.
        wire_down: the same, server to client.
    """
    compute = sum(r.client_compute for r in rounds)
    last = rounds[-1] if rounds else None
    return {
        "schema": 1,
        "name": config.name,
        "status": status,
        "method": config.method,
        "model": config.model.name,
        "dataset": config.data.path or config.data.name,
        "seed": config.seed,
        "clients": config.clients,
        "rounds": config.rounds,
        "metrics": _metrics(rounds),
        "best": _best(rounds),
        "bytes": {
            "up": ledger.bytes("up"),
            "down": ledger.bytes("down"),
            "setup_up": ledger.setup_up,
            "up_per_client_round": ledger.up_per_client_round,
            "dense_up": ledger.dense("up"),
            "dense_down": ledger.dense("down"),
            "reference_total": sum(r.reference_bytes for r in rounds),
            "wire_up": wire_up,
            "wire_down": wire_down,
        },
        "seconds": {
            "total": seconds,
            "client_compute": compute,
            # Clients that compute side by side make wall time minus their sum meaningless.
            "overhead": max(0.0, seconds - compute) if workers == 1 else None,
        },
        "memory": {"peak_rss_bytes": max((r.peak_rss_bytes for r in rounds), default=0)},
        "passes": {"forward": sum(r.forward for r in rounds), "backward": sum(r.backward for r in rounds)},
        "privacy": {"epsilon": last.epsilon if last else None, "delta": last.delta if last else None},
        "failures": sum(r.failures for r in rounds),
        "rejected": sum(r.rejected for r in rounds),
        "state_sha256": last.state_sha256 if last else None,
    }


def _metrics(rounds: Sequence[Round]) -> dict[str, float | None]:
    evaluated = next((r.metrics for r in reversed(rounds) if r.metrics), {})
    setup = rounds[0].metrics if rounds and rounds[0].round == 0 else {}
    return {
        **{key: evaluated.get(key) for key in ("accuracy", "loss", "perplexity")},
        "warm_accuracy": setup.get("accuracy"),
    }


def _best(rounds: Sequence[Round]) -> dict[str, float | None]:
    """Return the round with the highest accuracy, or with the lowest loss where there are no classes."""
    accurate = [r for r in rounds if r.metrics.get("accuracy") is not None]
    if accurate:
        best = max(accurate, key=lambda r: r.metrics["accuracy"])
        return {"accuracy": best.metrics["accuracy"], "round": best.round}
    measured = [r for r in rounds if r.metrics.get("loss") is not None]
    return {
        "accuracy": None,
        "round": min(measured, key=lambda r: r.metrics["loss"]).round if measured else None,
    }


def round_line(record: Round) -> dict[str, Any]:
    """Return one line of ``rounds.jsonl``."""
    return {
        "round": record.round,
        "accuracy": record.metrics.get("accuracy"),
        "loss": record.metrics.get("loss"),
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
        "participants": record.participants,
        "failures": record.failures,
        "rejected": record.rejected,
        "peak_rss_bytes": record.peak_rss_bytes,
    }
