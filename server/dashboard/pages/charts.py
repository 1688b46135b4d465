"""A run's curves, as options of ECharts; colours that read on light and on dark ground."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

from fedllm.measures import in_order
from fedllm.runs.records import RoundRecord
from fedllm.runs.summary import SIMULATED, simulated_seconds
from server.dashboard.reading.runs import Traffic

__all__ = [
    "AXES",
    "UNITS",
    "axes",
    "compression",
    "fact_names",
    "facts",
    "metric_names",
    "nothing",
    "quality",
    "traffic",
]

Axis = Literal["round", "bytes", "seconds", "simulated"]
AXES: tuple[Axis, ...] = ("round", "bytes", "seconds", "simulated")
UNITS = ("bytes", "times fewer than dense")
_ACCENT, _SECOND, _SOFT, _LINE = "#2a8f99", "#c98a2b", "#7f8b9b", "rgba(128,140,155,0.25)"
_UNITS = {
    "round": "round",
    "bytes": "MB moved",
    "seconds": "seconds",
    "simulated": "seconds of simulated devices",
}
_NO_CURVE = ("accepted", "clients")
_WORST = "worst tenth of clients, own texts"
_TOGETHER = (("directions", "variance"), ("energy", "rank"))
"""What a method's paper looks at side by side: FwdLLM's pacing, FedKD's truncation."""
_FIRST = ("directions", "variance", "energy", "rank", "epsilon", "loss")
_MANY = 60
"""Bars from which on gaps between them would only blur."""


def axes(rounds: Sequence[RoundRecord]) -> list[Axis]:
    """Return what quality is drawn against; simulated time only where devices were simulated."""
    return [axis for axis in AXES if axis != "simulated" or simulated_seconds(rounds) is not None]


def metric_names(rounds: Sequence[RoundRecord], first: str) -> list[str]:
    """Return the metrics that were measured, the one that decides first."""
    return in_order({name for record in rounds for name in record.metrics}, first)


def quality(rounds: Sequence[RoundRecord], metric: str, axis: Axis) -> dict[str, Any]:
    """Draw a metric against rounds, bytes moved so far, or seconds so far; that of the worst clients too."""
    positions: dict[Axis, list[float]] = {
        "round": [float(record.round) for record in rounds],
        "bytes": [total / 1e6 for total in accumulate(r.bytes_up + r.bytes_down for r in rounds)],
        "seconds": list(accumulate(record.seconds for record in rounds)),
        "simulated": list(accumulate(record.details.get(SIMULATED, 0.0) for record in rounds)),
    }
    told = list(zip(positions[axis], rounds, strict=True))
    points = [[x, record.metrics[metric]] for x, record in told if record.metrics.get(metric) is not None]
    spreads = [(x, record.details.get("spread", {}).get(metric)) for x, record in told]
    worst = {_WORST: [[x, spread["worst_tenth"]] for x, spread in spreads if spread]}
    return _lines({metric: points} | (worst if worst[_WORST] else {}), _UNITS[axis], whole=axis == "round")


def traffic(moved: Sequence[Traffic]) -> dict[str, Any]:
    """Draw kilobytes by round, up and down."""
    series: list[dict[str, Any]] = [
        {
            "name": name,
            "type": "bar",
            "stack": "moved",
            "itemStyle": {"color": colour},
            "barCategoryGap": "20%" if len(moved) < _MANY else "0%",
            "barMaxWidth": 48,
            "data": [round(getattr(row, field) / 1000, 3) for row in moved],
        }
        for name, field, colour in (("up kB", "up", _ACCENT), ("down kB", "down", _SECOND))
    ]
    drawn = _frame(series, "round", whole=True, from_zero=True)
    drawn["xAxis"] |= {"type": "category", "data": [row.round for row in moved]}
    return drawn


def compression(moved: Sequence[Traffic]) -> dict[str, Any]:
    """Draw how many times fewer bytes crossed than without a codec, by round, up and down.

    >>> compression([Traffic(1, 20, 10, 80, 10)])["series"][0]["data"]
    [[1, 4.0]]
    """
    curves = {
        "up, times fewer": [[row.round, row.dense_up / row.up] for row in moved if row.round and row.up],
        "down, times fewer": [
            [row.round, row.dense_down / row.down] for row in moved if row.round and row.down
        ],
    }
    return _lines(curves, "round", whole=True)


def fact_names(rounds: Sequence[RoundRecord]) -> list[str]:
    """Return what else was recorded by round, what its paper looks at first; ``a, b`` are drawn together."""
    names = {
        name
        for record in rounds
        for name, value in record.details.items()
        if name not in _NO_CURVE and isinstance(value, int | float) and not isinstance(value, bool)
    }
    if any(record.epsilon is not None for record in rounds):
        names.add("epsilon")
    together = [", ".join(pair) for pair in _TOGETHER if names.issuperset(pair)]
    return together + sorted(names, key=lambda name: (_rank(name), name))


def _rank(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def facts(rounds: Sequence[RoundRecord], name: str) -> dict[str, Any]:
    """Draw one of :func:`fact_names` against rounds; of two that stand together, each has its own scale."""
    curves = {
        one: [
            [record.round, value]
            for record in rounds
            if (value := record.epsilon if one == "epsilon" else record.details.get(one)) is not None
        ]
        for one in name.split(", ")
    }
    drawn = _lines(curves, "round", whole=True)
    if len(curves) == 2:
        drawn["yAxis"] = [
            drawn["yAxis"],
            {**drawn["yAxis"], "position": "right", "splitLine": {"show": False}},
        ]
        drawn["series"][1]["yAxisIndex"] = 1
        drawn["grid"] |= {"right": 56}
    return drawn


def nothing(said: str) -> dict[str, Any]:
    """Draw no curve, and say why there is none."""
    words = {"fontSize": 14, "fontWeight": "normal", "color": _SOFT}
    return {"title": {"text": said, "left": "center", "top": "middle", "textStyle": words}}


def _lines(curves: dict[str, list[list[float]]], label: str, *, whole: bool) -> dict[str, Any]:
    series = [
        {
            "name": name,
            "type": "line",
            "data": points,
            "showSymbol": len(points) < 30,
            "symbolSize": 6,
            "lineStyle": {"width": 2, "color": colour},
            "itemStyle": {"color": colour},
        }
        for (name, points), colour in zip(curves.items(), (_ACCENT, _SECOND), strict=False)
    ]
    return _frame(series, label, whole=whole, from_zero=False)


def _frame(series: list[dict[str, Any]], label: str, *, whole: bool, from_zero: bool) -> dict[str, Any]:
    text = {"color": _SOFT}
    across = {
        "type": "value",
        "name": label,
        "nameLocation": "middle",
        "nameGap": 26,
        "axisLabel": text,
        "nameTextStyle": text,
        "axisLine": {"lineStyle": {"color": _LINE}},
        "splitLine": {"show": False},
        "min": "dataMin" if not from_zero else None,
        "max": "dataMax" if not from_zero else None,
    }
    if whole:
        across["minInterval"] = 1
    return {
        "animation": False,
        "aria": {"enabled": True},
        "textStyle": text,
        "grid": {"left": 56, "right": 16, "top": 30, "bottom": 44},
        "legend": {"top": 0, "right": 0, "textStyle": text, "show": len(series) > 1},
        "tooltip": {"trigger": "axis"},
        "xAxis": {key: value for key, value in across.items() if value is not None},
        "yAxis": {
            "type": "value",
            "scale": not from_zero,
            "axisLabel": text,
            "splitLine": {"lineStyle": {"color": _LINE}},
        },
        "series": series,
    }
