"""``/metrics``: the runs for Prometheus, read when it asks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from server.dashboard.desk import Desk
from server.dashboard.shelf import Overview

__all__ = ["MOST_NODES", "MOST_RUNS", "render"]

MOST_RUNS = 50
"""Runs that are exported: live ones first, then the latest."""
MOST_NODES = 200
"""Nodes that are exported, and of live runs only; a series a node and run would grow for ever."""


class _Runs(Collector):
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def collect(self) -> Iterator[Metric]:
        views = self._desk.overviews()
        yield _gauge("runs", "Runs by state.", ["state"], _states(views))
        disk = shutil.disk_usage(self._desk.root)
        yield _gauge("disk_free_bytes", "Free space where the runs lie.", [], [((), disk.free)])
        yield from _of_runs(views[:MOST_RUNS])
        yield from self._of_nodes([view for view in views if view.live])

    def _of_nodes(self, live: list[Overview]) -> Iterator[Metric]:
        rows = [(view.name, node) for view in live for node in self._desk.shelf.nodes(view.name)][:MOST_NODES]
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


def render(desk: Desk) -> bytes:
    """Return the text that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(_Runs(desk))
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
    yield gauge("round_seconds", "Mean time of the last five rounds.", "round_seconds")
    yield _gauge("run_quality", "Last measured quality on the server's test set.", ["run", "metric"],
                 [((view.name, view.metric), view.value) for view in views])  # fmt: skip
    yield _gauge("run_best_quality", "Best accuracy or loss so far, by the run's own measure.", ["run"],
                 [((view.name,), max(view.series, default=None)) for view in views
                  if view.metric == "accuracy"])  # fmt: skip
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
