"""What a run's text files hold: ``summary.json``, schema 1, whose keys never change, and its neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fedllm.config import RunConfig
from fedllm.measures import better, finite, judged, leading, measure
from fedllm.runs.ledger import Ledger
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.wording import number

__all__ = [
    "SIMULATED",
    "STALENESS",
    "WARM",
    "Best",
    "Status",
    "best_of",
    "bests",
    "describe_partition",
    "ended_early",
    "fairness_of",
    "fairness_sentence",
    "own_scores",
    "round_line",
    "simulated_seconds",
    "summarise",
    "tries",
]

Status = Literal["running", "finished", "failed", "stopped", "interrupted"]


def summarise(
    config: RunConfig,
    rounds: Sequence[RoundRecord],
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
        rounds: committed rounds, ascending; round 0 is the starting point, after the setup if there is one.
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
        "best": _best(rounds, config.metric),
        "fairness": fairness_of(rounds),
        "ended_early": ended_early(config, rounds) if status == "finished" else None,
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
            "simulated": simulated_seconds(rounds),
        },
        "memory": {"peak_rss_bytes": max((r.peak_rss_bytes for r in rounds), default=0)},
        "passes": {"forward": sum(r.forward for r in rounds), "backward": sum(r.backward for r in rounds)},
        "privacy": {"epsilon": last.epsilon if last else None, "delta": last.delta if last else None},
        "failures": sum(r.failures for r in rounds),
        "rejected": sum(r.rejected for r in rounds),
        "state_sha256": last.state_sha256 if last else None,
    }


SIMULATED = "seconds_simulated"
"""Detail of a round, and of a client's answer, that says how long it took on simulated devices."""
STALENESS = ("staleness_mean", "staleness_max")
"""Details of an asynchronous round: commits since its answers were begun."""
WARM = "warm_accuracy"
"""Accuracy after the setup; among a summary's metrics, though no round measures it."""
_ALWAYS = ("accuracy", "macro_f1", "loss", "perplexity")
"""Metrics that have a key in every summary, measured or not."""


def _metrics(rounds: Sequence[RoundRecord]) -> dict[str, float | None]:
    evaluated = next((r.metrics for r in reversed(rounds) if r.metrics), {})
    # Without a setup, in which clients take part, round 0 measures what nobody has warmed.
    warmed = bool(rounds) and rounds[0].round == 0 and rounds[0].participants > 0
    return {
        **{**dict.fromkeys(_ALWAYS), **evaluated},
        WARM: rounds[0].metrics.get("accuracy") if warmed else None,
    }


def simulated_seconds(rounds: Sequence[RoundRecord]) -> float | None:
    """Return how long rounds took on simulated devices; None where no device was simulated.

    >>> simulated_seconds([RoundRecord(round=at, details={SIMULATED: 1.5}) for at in (1, 2)])
    3.0
    """
    told = [r.details[SIMULATED] for r in rounds if SIMULATED in r.details]
    return sum(told) if told else None


class Best(NamedTuple):
    """The round with the best value of the metric that decides, and that value."""

    round: int
    value: float


Measured = Iterable[tuple[int, Mapping[str, float | None]]]
"""Number and metrics of every round, ascending; None stands for NaN and infinities."""


def bests(measured: Measured, metric: str) -> Iterator[tuple[int, Best | None]]:
    """Yield every round with the best one so far; of equal values the earliest is the best.

    >>> values = [0.5, 0.7, None, 0.7, 0.8]
    >>> found = bests(enumerate({"accuracy": value} for value in values), "accuracy")
    >>> [best.round for _, best in found]
    [0, 1, 1, 1, 4]
    """
    best: Best | None = None
    for reached, metrics in measured:
        value = metrics.get(metric)
        if finite(value) and (best is None or better(metric, value, best.value)):
            best = Best(reached, value)
        yield reached, best


def best_of(measured: Measured, metric: str) -> Best | None:
    """Return the best round; None where nothing was measured that is a number.

    >>> best_of([(1, {"loss": 2.0}), (2, {}), (3, {"loss": 1.5}), (4, {"loss": 1.5})], "loss")
    Best(round=3, value=1.5)
    """
    return [None, *(best for _, best in bests(measured, metric))][-1]


def _best(rounds: Sequence[RoundRecord], metric: str) -> dict[str, Any]:
    found = best_of(((r.round, r.metrics) for r in rounds), metric)
    metrics = next((r.metrics for r in rounds if found is not None and r.round == found.round), {})
    return {
        "round": found and found.round,
        "metric": metric,
        "value": found and found.value,
        "accuracy": metrics.get("accuracy"),
    }


def fairness_of(rounds: Sequence[RoundRecord]) -> dict[str, Any] | None:
    """Return how differently clients fared on their own texts, the last time that they were asked."""
    asked = [r for r in rounds if r.details.get("spread")]
    return {"round": asked[-1].round, "metrics": asked[-1].details["spread"]} if asked else None


def fairness_sentence(fairness: Mapping[str, Any], metric: str) -> str:
    """Say it for people, by the metric that decides or another one.

    >>> told = {"clients": 10, "mean": 0.9, "std": 0.05, "worst_tenth": 0.75, "best_tenth": 0.95, "gap": 0.2}
    >>> fairness_sentence({"round": 3, "metrics": {"accuracy": told}}, "macro_f1")
    'accuracy of 10 clients on their own texts, round 3: 0.9 +- 0.05, worst tenth 0.75, fairness gap 0.2'
    """
    name = leading(fairness["metrics"], metric)
    told = fairness["metrics"][name]
    return (
        f"{measure(name).title} of {told['clients']} clients on their own texts, round {fairness['round']}: "
        f"{number(told['mean'])} +- {number(told['std'])}, worst tenth {number(told['worst_tenth'])}, "
        f"fairness gap {number(told['gap'])}"
    )


def own_scores(row: NodeRound, metric: str) -> dict[str, float]:
    """Return what a client measured on its own texts, by metric; ``metric`` is the one that decides."""
    told = {**row.metrics} if row.loss is None else {**row.metrics, "loss": row.loss}
    return {name: told[name] for name in judged(told, metric)}


def tries(rounds: Sequence[RoundRecord], metric: str, after: int = 0) -> int:
    """Return how many evaluations have brought nothing better since the best one.

    Args:
        rounds: committed rounds, ascending.
        metric: the one that decides.
        after: the round after which counting begins, if that is later.

    >>> losses = enumerate([2.0, 1.5, 1.5, 1.6])
    >>> told = [RoundRecord(round=at, metrics={"loss": loss}) for at, loss in losses]
    >>> tries(told, "loss"), tries(told, "loss", after=2)
    (2, 1)
    """
    best = best_of(((r.round, r.metrics) for r in rounds), metric)
    since = max(after, best.round if best else 0)
    return sum(1 for r in rounds if r.round > since and r.metrics)


def ended_early(config: RunConfig, rounds: Sequence[RoundRecord]) -> str | None:
    """Say why a run that is finished has fewer rounds than it was asked for; None where it has not."""
    last = rounds[-1].round if rounds else 0
    if last >= config.rounds:
        return None
    patience, budget = config.evaluation.patience, config.privacy.target_epsilon
    if budget is not None and not 0 < patience <= tries(rounds, config.metric):
        return (
            f"ended after round {last} of {config.rounds}: another would spend more than "
            f"privacy.target_epsilon = {budget:g}"
        )
    best = best_of(((r.round, r.metrics) for r in rounds), config.metric)
    told = f"the best, {number(best.value)}, is of round {best.round}" if best else "it never was a number"
    return (
        f"ended after round {last} of {config.rounds}: no better {measure(config.metric).title} in "
        f"{config.evaluation.patience} evaluations (evaluation.patience); {told}"
    )


def round_line(record: RoundRecord) -> dict[str, Any]:
    """Return one line of ``rounds.jsonl``."""
    told = {key: record.details[key] for key in (SIMULATED, *STALENESS) if key in record.details}
    return {
        "round": record.round,
        **{**dict.fromkeys(_ALWAYS[:3]), **record.metrics},
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
        "participants": record.participants,
        "failures": record.failures,
        "rejected": record.rejected,
        "peak_rss_bytes": record.peak_rss_bytes,
        **told,
    }


def describe_partition(
    indices: Sequence[Sequence[int]],
    labels: Sequence[int] | None,
    label_names: Sequence[str],
    held_out: Sequence[int] = (),
) -> dict[str, Any]:
    """Return a partition as JSON.

    >>> describe_partition([[0, 2], [1]], [1, 0, 1], ["a", "b"])["clients"][0]
    {'node': 0, 'examples': 2, 'labels': [0, 2], 'indices': [0, 2]}
    """
    clients = []
    for node, own in enumerate(indices):
        counts: list[int] | None = None
        if labels is not None:
            counts = [0] * len(label_names)
            for index in own:
                counts[int(labels[index])] += 1
        clients.append(
            {"node": node, "examples": len(own), "labels": counts, "indices": [int(i) for i in own]}
        )
    return {"label_names": list(label_names), "clients": clients, "held_out": [int(i) for i in held_out]}
