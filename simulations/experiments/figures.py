"""The figures of an experiment as a paper prints them: one per question, named directly, with error bars.

Cells are dots, baselines squares; an error bar is the 95 % interval of the mean over seeds, from three
seeds on.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm.measures import measure
from fedllm.runs.records import RoundRecord
from fedllm.runs.summary import simulated_seconds
from simulations.experiments.findings import said, shown, title
from simulations.results.plots import PALETTE, Against, repeated, scale_bytes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Runs", "courses", "differences", "figures", "front", "means", "tradeoff"]

Runs = list[tuple[int, Sequence[RoundRecord]]]
"""Seed and rounds of each run."""

_WIDTH, _ROW = 6.4, 0.34
_POINTS = 4
"""Rounds with a score from which on a course is drawn."""
_NAME = 34
"""Characters of a line of a row's name."""


def figures(found: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """Return caption and figure by name, those for which there is something to draw."""
    metric = f"metrics.{found['metric']}"
    name, better = measure(found["metric"]).title, "higher" if measure(found["metric"]).higher else "lower"
    error_bars = "bars: 95 % interval over seeds, from three on; small dots: single seeds"
    drawn: dict[str, tuple[str, Figure]] = {}
    measured = [cell for cell in found["cells"] if cell["measured"][metric]]
    if measured:
        caption = f"Test {name} after the last round ({better} is better); {error_bars}"
        drawn[found["metric"]] = (caption, means(measured, metric))
    sent = [cell for cell in measured if cell["measured"]["bytes.total"]]
    if sent:
        caption = (
            f"Test {name} ({better} is better) and what was sent for it; the dotted line joins what no other "
            f"cell betters in both; {error_bars}"
        )
        drawn[f"{found['metric']}-bytes"] = (caption, tradeoff(sent, metric))
    pairs = [one for one in found["differences"] if one["found"] and one["measure"] == metric]
    if pairs := [one for one in pairs if one["kind"] == "difference"]:
        titles = {cell["name"]: cell["title"] for cell in found["cells"]}
        caption = f"Differences in test {name}, paired by seed; bars: 95 % interval, from three seeds on"
        drawn["differences"] = (caption, differences(pairs, titles, metric))
    return drawn


def courses(groups: Mapping[str, Runs], metric: str) -> dict[str, tuple[str, Figure]]:
    """Return figures of how cells came to where they ended: by rounds, passes, bytes, and simulated time.

    Args:
        groups: seed and rounds of the runs of each cell.
        metric: that is drawn; cells that measured it in fewer than four rounds are left out.
    """
    shown = {
        title: runs
        for title, runs in groups.items()
        if min(sum(metric in one.metrics for one in rounds) for _, rounds in runs) >= _POINTS
    }
    if not shown:
        return {}
    against: list[Against] = ["round", "passes", "bytes"]
    if all(simulated_seconds(rounds) is not None for runs in shown.values() for _, rounds in runs):
        against.append("simulated")
    name = measure(metric).title
    told = {"round": "after each round", "passes": "by clients' passes", "bytes": "by bytes sent"}
    return {
        f"{metric}-by-{axis}": (
            f"Test {name} {told.get(axis, 'on the clock of simulated devices')}; "
            "mean over seeds, from three on with its 95 % interval",
            repeated(shown, metric, axis),
        )
        for axis in against
    }


def _canvas(rows: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.9 + _ROW * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _dot(axes: Axes, x: Any, y: Any, told: Mapping[str, Any], *, baseline: bool, across: bool) -> None:
    """Draw a mean with its interval, if that means something, along x or along y."""
    centre = x if across else y
    half: Any = [[centre - told["low"]], [told["high"] - centre]] if told["means_something"] else None
    look: dict[str, Any] = {"fmt": "s" if baseline else "o", "color": PALETTE[1] if baseline else PALETTE[0]}
    look["xerr" if across else "yerr"] = half
    if not across:
        look["ecolor"] = "#a9bccb"  # names stand before these bars
    axes.errorbar(x, y, **look, markersize=6, capsize=3, elinewidth=1.4, zorder=3)


def _rows(axes: Axes, names: Sequence[str], values: Sequence[str]) -> None:
    """Name rows on the left, the first on top, and write their values on the right."""
    places = range(len(names))
    axes.set_yticks(places, [textwrap.fill(name, _NAME) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for place, text in zip(places, values, strict=True):
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)


@styled
def means(cells: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """Draw a measure of every cell, a row each."""
    figure, axes = _canvas(len(cells))
    for place, cell in enumerate(cells):
        told = cell["measured"][name]
        seeds = list(told["by_seed"].values())
        axes.plot(seeds, [place] * len(seeds), ".", color="#7f7f7f", markersize=4, zorder=2)
        _dot(axes, told["mean"], place, told, baseline=bool(cell["baseline"]), across=True)
    _rows(axes, [cell["title"] for cell in cells], [said(name, c["measured"][name]["mean"]) for c in cells])
    axes.set_xlabel(f"test {title(name)}")
    return figure


@styled
def differences(pairs: Sequence[Mapping[str, Any]], titles: Mapping[str, str], name: str) -> Figure:
    """Draw paired differences of a measure, a row each, beside a line at none."""
    figure, axes = _canvas(1.6 * len(pairs))
    axes.axvline(0.0, color="#2b2f36", linewidth=1)
    for place, one in enumerate(pairs):
        _dot(axes, one["found"]["mean"], place, one["found"], baseline=False, across=True)
    names = [f"{titles[one['of']]} minus {titles[one['against']]}" for one in pairs]
    _rows(axes, names, [shown(one).partition(" ")[0] for one in pairs])
    axes.set_xlabel(f"difference in test {title(name)}")
    return figure


@styled
def tradeoff(cells: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """Draw a measure against the bytes that were sent for it, each dot with its cell's name.

    A line joins the cells that no other betters in both (the Pareto front).
    """
    figure, axes = _canvas(11)
    sent = np.array([cell["measured"]["bytes.total"]["mean"] for cell in cells])
    means = np.array([cell["measured"][name]["mean"] for cell in cells])
    kept = front(sent.tolist(), means.tolist(), higher=measure(name.partition(".")[2]).higher)
    axes.plot(sent[kept], means[kept], color="#7f7f7f", linewidth=1, linestyle=":", zorder=1)
    for cell, x in zip(cells, sent, strict=True):
        told = cell["measured"][name]
        _dot(axes, x, told["mean"], told, baseline=False, across=False)
    scale_bytes(axes, "x", sent)
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("sent in all, both directions (bytes)")
    axes.set_ylabel(f"test {title(name)}")
    _name_dots(
        figure,
        axes,
        [(cell["title"], x, cell["measured"][name]["mean"]) for cell, x in zip(cells, sent, strict=True)],
    )
    return figure


def front(costs: Sequence[float], scores: Sequence[float], *, higher: bool) -> list[int]:
    """Return the Pareto front: by cost, those that no other one betters in score at no more cost.

    >>> front([3.0, 1.0, 2.0, 4.0], [0.9, 0.5, 0.4, 0.8], higher=True)
    [1, 0]
    """
    best: list[int] = []
    sign = 1.0 if higher else -1.0
    for place in sorted(range(len(costs)), key=lambda k: (costs[k], -sign * scores[k])):
        if not best or sign * scores[place] > sign * scores[best[-1]]:
            best.append(place)
    return best


def _name_dots(figure: Figure, axes: Axes, dots: Sequence[tuple[str, float, float]]) -> None:
    """Write names beside dots, each in the first place that is free of other names and dots."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    inside = axes.get_window_extent()
    centres = [axes.transData.transform((x, y)) for _, x, y in dots]
    taken = [_box(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    places = [
        (side, height) for height in (0, 12, -12, 24, -24, 36, -36, 48, -48) for side in ("left", "right")
    ]
    for text, x, y in dots:
        for side, height in places:
            across = 8 if side == "left" else -8
            written = axes.annotate(
                text,
                (x, y),
                (across, height),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": "#7f7f7f", "linewidth": 0.6} if height else None,
            )
            written.update_positions(renderer)
            extent = Text.get_window_extent(written)  # without its line
            free = not any(extent.overlaps(other) for other in taken)
            if free and inside.x0 <= extent.x0 and extent.x1 <= inside.x1:
                break
            if (side, height) != places[-1]:
                written.remove()
        taken.append(extent)


def _box(left: float, low: float, right: float, high: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(left, low, right, high)
