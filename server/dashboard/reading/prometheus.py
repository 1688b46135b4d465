"""``/metrics``: the runs for Prometheus, read when it asks."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from fedllm.runs.totals import NodeTotal
from server.dashboard.actions.operations import Operations
from server.dashboard.reading.runs import Overview
from server.dashboard.reading.verdict import health

__all__ = ["MOST_NODES", "MOST_RUNS", "render"]

MOST_RUNS = 50
"""Runs that are exported: live ones first, then the latest."""
MOST_NODES = 200
"""Nodes that are exported, and of live runs only; a series a node and run would grow for ever."""


class _Runs(Collector):
    def __init__(self, ops: Operations) -> None:
        self._ops = ops

    def collect(self) -> Iterator[Metric]:
        views = self._ops.overviews()
        yield _gauge("runs", "Runs by state.", ["state"], _states(views))
        disk = shutil.disk_usage(self._ops.root)
        yield _gauge("disk_free_bytes", "Free space where the runs lie.", [], [((), disk.free)])
        shown = views[:MOST_RUNS]
        nodes = {view.name: self._ops.index.nodes(view.name) for view in shown if view.live}
        yield from _of_runs(shown)
        verdicts = [(view.name, health(view, nodes.get(view.name, ()))) for view in shown]
        yield _gauge("run_verdict", "1 for what the run's page answers to: is it running well?",
                     ["run", "tone", "headline"],
                     [((name, found.tone, found.headline), 1) for name, found in verdicts])  # fmt: skip
        yield _gauge("run_nodes", "Nodes of a live run by state.", ["run", "state"],
                     [((name, state), count) for name, rows in nodes.items()
                      for state, count in Counter(node.state for node in rows).items()])  # fmt: skip
        yield from self._of_nodes(nodes)

    def _of_nodes(self, nodes: Mapping[str, Sequence[NodeTotal]]) -> Iterator[Metric]:
        rows = [(name, node) for name, held in nodes.items() for node in held][:MOST_NODES]
        labels = ["run", "node"]
        yield _counter(
            "node_bytes", "Bytes that crossed.", [*labels, "direction"],
            [((run, str(node.node), way), count) for run, node in rows
             for way, count in (("up", node.bytes_up), ("down", node.bytes_down))],
        )  # fmt: skip
        yield _counter(
            "node_answers", "Answers by what became of them.", [*labels, "status"],
            [((run, str(node.node), status), getattr(node, status)) for run, node in rows
             for status in ("accepted", "late", "failed", "rejected")],
        )  # fmt: skip
        yield _gauge(
            "node_compute_seconds", "Mean time that a node computes for an accepted answer.", labels,
            [((run, str(node.node)), node.compute_seconds) for run, node in rows],
        )  # fmt: skip


def render(ops: Operations) -> bytes:
    """Return the text that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(_Runs(ops))
    return generate_latest(registry)


def _of_runs(views: list[Overview]) -> Iterator[Metric]:
    def gauge(name: str, says: str, attribute: str) -> Metric:
        return _gauge(
            f"run_{name}", says, ["run"], [((view.name,), getattr(view, attribute)) for view in views]
        )

    yield _gauge("run_info", "Constant 1.", ["run", "method", "model", "state"],
                 [((view.name, view.method, view.model, view.state), 1) for view in views])  # fmt: skip
    yield _gauge("run_live", "1 while a process works on it and is not paused.", ["run"],
                 [((view.name,), int(view.state == "running")) for view in views])  # fmt: skip
    yield gauge("round", "Last committed round.", "round")
    yield gauge("rounds", "Planned rounds.", "rounds")
    yield gauge("last_change_timestamp_seconds", "Unix time of the last sign of life.", "changed_at")
    yield gauge("last_progress_timestamp_seconds", "Unix time at which it last got on.", "progress_at")
    yield gauge("quorum", "Answers that a round needs.", "quorum")
    yield _gauge("run_pending_orders", "Orders that a run has not obeyed yet.", ["run"],
                 [((view.name,), len(view.pending)) for view in views if view.live])  # fmt: skip
    yield gauge("round_seconds", "Mean time of the last five rounds.", "round_seconds")
    yield _gauge("run_quality", "Last measured quality on the server's test set.", ["run", "metric"],
                 [((view.name, view.metric), view.value) for view in views])  # fmt: skip
    yield _gauge("run_epsilon", "Privacy spent, of a run with differential privacy.", ["run"],
                 [((view.name,), view.epsilon) for view in views])  # fmt: skip
    yield _counter("run_bytes", "Bytes that crossed.", ["run", "direction"],
                   [((view.name, way), count) for view in views
                    for way, count in (("up", view.bytes_up), ("down", view.bytes_down))])  # fmt: skip
    yield _counter("run_lost_answers", "Answers that did not count.", ["run", "why"],
                   [((view.name, why), count) for view in views
                    for why, count in (("failed", view.failures), ("rejected", view.rejected))])  # fmt: skip
    yield _counter("run_seconds", "Wall time of the run.", ["run"],
                   [((view.name,), view.seconds) for view in views])  # fmt: skip


Sample = tuple[tuple[str, ...], float | None]


def _states(views: list[Overview]) -> list[Sample]:
    states = ("running", "paused", "starting", "finished", "failed", "stopped", "interrupted", "unreadable")
    return [((state,), sum(view.state == state for view in views)) for state in states]


def _gauge(name: str, says: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    return _filled(GaugeMetricFamily(f"fedllm_{name}", says, labels=labels), samples)


def _counter(name: str, says: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    return _filled(CounterMetricFamily(f"fedllm_{name}", says, labels=labels), samples)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, samples: Iterable[Sample]
) -> GaugeMetricFamily | CounterMetricFamily:
    for labels, value in samples:
        if value is not None:
            family.add_metric(list(labels), value)
    return family
