"""Plots of runs: one palette that colour-blind readers can tell apart, as PNG for papers and SVG for pages.

Every function returns a matplotlib ``Figure`` of its own; nothing touches pyplot's global state.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np

from fedllm.durable import replace_file
from fedllm.run_database import Round

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AXES",
    "PALETTE",
    "curves",
    "data_uri",
    "partition",
    "progress",
    "repeated",
    "save",
    "svg",
    "traffic",
]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Okabe and Ito's colours, with yellow and black replaced by two that show on white and on black."""

_MARKERS = "osD^vP*X"
_INK = "#2b2f36"
_GRID = "#c9cdd3"

Arguments = ParamSpec("Arguments")
Against = Literal["round", "bytes", "seconds"]
AXES: tuple[Against, ...] = ("round", "bytes", "seconds")

_LABELS = {
    "round": "round", "bytes": "megabytes, both directions", "seconds": "seconds",
    "accuracy": "test accuracy", "loss": "test loss", "perplexity": "test perplexity",
}  # fmt: skip

_STYLE: Any = {
    "font.size": 11,
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def _styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw in this module's style; matplotlib is imported only when something is drawn."""

    @functools.wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def progress(rounds: Sequence[Round], metric: str, against: Against) -> tuple[list[float], list[float]]:
    """Return where a run stood whenever it was evaluated: x and y.

    Args:
        rounds: ascending; what came before a round counts towards its bytes and seconds.
        metric: name of a metric; rounds without it are passed over.
        against: ``round``, ``bytes`` (megabytes, both directions) or ``seconds``.
    """
    moved = np.cumsum([(r.bytes_up + r.bytes_down) / 1e6 for r in rounds])
    elapsed = np.cumsum([r.seconds for r in rounds])
    place = {"round": [r.round for r in rounds], "bytes": moved.tolist(), "seconds": elapsed.tolist()}[
        against
    ]
    measured = [(x, r.metrics[metric]) for x, r in zip(place, rounds, strict=True) if metric in r.metrics]
    return [float(x) for x, _ in measured], [float(y) for _, y in measured]


@_styled
def curves(
    runs: Mapping[str, Sequence[Round]], metric: str = "accuracy", against: Against = "round"
) -> Figure:
    """Draw a metric of one run or several; each run has its colour and its marker."""
    figure, axes = _canvas(4.6, 3.1)
    for index, (label, rounds) in enumerate(runs.items()):
        x, y = progress(rounds, metric, against)
        color, marker = PALETTE[index % len(PALETTE)], _MARKERS[index % len(_MARKERS)]
        axes.plot(x, y, color=color, marker=marker if len(x) <= 40 else None, label=label)
    _finish(axes, against, metric, legend=len(runs) > 1)
    return figure


@_styled
def repeated(
    groups: Mapping[str, Sequence[Sequence[Round]]], metric: str = "accuracy", against: Against = "round"
) -> Figure:
    """Draw the mean over seeds of each group, and the range between its lowest and highest run.

    A mean is drawn where every run of the group was evaluated.
    """
    figure, axes = _canvas(4.6, 3.1)
    for index, (label, runs) in enumerate(groups.items()):
        paths = [progress(rounds, metric, against) for rounds in runs]
        length = min(len(y) for _, y in paths)
        x = np.mean([x[:length] for x, _ in paths], axis=0)
        y = np.array([y[:length] for _, y in paths])
        color = PALETTE[index % len(PALETTE)]
        axes.plot(x, y.mean(axis=0), color=color, label=f"{label} ({len(runs)} seeds)")
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.18, linewidth=0)
    _finish(axes, against, metric, legend=True)
    return figure


@_styled
def traffic(rounds: Sequence[Round]) -> Figure:
    """Draw the bytes of each round, upload and download side by side."""
    figure, axes = _canvas(4.6, 3.1)
    numbers = np.array([r.round for r in rounds])
    up = np.array([r.bytes_up / 1e6 for r in rounds])
    down = np.array([r.bytes_down / 1e6 for r in rounds])
    if len(rounds) <= 60:
        axes.bar(numbers - 0.2, up, 0.38, color=PALETTE[0], label="up")
        axes.bar(numbers + 0.2, down, 0.38, color=PALETTE[1], label="down")
    else:
        axes.step(numbers, up, where="mid", color=PALETTE[0], label="up")
        axes.step(numbers, down, where="mid", color=PALETTE[1], label="down", linestyle="--")
    axes.set_ylim(0, 1.05 * max(*up, *down, 1e-9))
    _finish(axes, "round", "megabytes per round", legend=True)
    return figure


@_styled
def partition(description: Mapping[str, Any]) -> Figure:
    """Draw how many texts of each class each client holds, from ``partition.json``."""
    clients, names = list(description["clients"]), list(description["label_names"])
    figure, axes = _canvas(4.6, 3.1)
    many = len(clients) > 60
    if many:
        clients.sort(key=lambda client: -client["examples"])
    rows, names = _strata(clients, names)
    places = np.arange(len(clients)) if many else np.array([client["node"] for client in clients])
    floor = np.zeros(len(clients))
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        color = PALETTE[index]
        axes.bar(
            places, row, 1.0 if many else 0.8, bottom=floor, color=color, label=name or None, linewidth=0
        )
        floor += row
    axes.grid(visible=False, axis="x")
    _finish(axes, "clients, largest first" if many else "client", "training texts", legend=any(names))
    if len(clients) <= 20:
        axes.set_xticks(places)
    return figure


def _strata(clients: Sequence[Mapping[str, Any]], names: list[str]) -> tuple[list[Any], list[str]]:
    """Return one row of counts per class; the smallest classes share the last colour when there are many."""
    if not names or any(client["labels"] is None for client in clients):
        return [np.array([client["examples"] for client in clients], dtype=float)], [""]
    counts = np.array([client["labels"] for client in clients], dtype=float).T
    if len(names) <= len(PALETTE):
        return list(counts), names
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    shown, rest = order[: len(PALETTE) - 1], order[len(PALETTE) - 1 :]
    rows = [*(counts[i] for i in shown), counts[rest].sum(axis=0)]
    return rows, [*(names[i] for i in shown), f"{len(rest)} others"]


def _finish(axes: Axes, x: str, y: str, *, legend: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(_LABELS.get(x, x))
    axes.set_ylabel(_LABELS.get(y, y))
    if x in ("round", "client"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        # Above the axes, where no curve or bar can be.
        count = len(axes.get_legend_handles_labels()[1])
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, count), fontsize=10)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG of 160 dots per inch on white."""
    replace_file(path, _png(figure))
    return path


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """Return the PNG as a ``data:`` address for an HTML page."""
    return f"data:image/png;base64,{base64.b64encode(_png(figure)).decode()}"


def svg(figure: Figure, name: str) -> str:
    """Return an SVG element for an HTML page that follows the page's text colour and font.

    Args:
        figure: what to draw.
        name: unique within the page; its ids begin with it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id=")|(href="#)|(url\(#)', lambda match: f"{match[0]}{name}-", text)
    # Page variables where the page has them; colours of bars stay, lines need more light on dark paper.
    text = text.replace(_INK, "currentColor").replace(_GRID, f"var(--line, {_GRID})")
    text = text.replace(PALETTE[0], f"var(--accent, {PALETTE[0]})").replace("'DejaVu Sans', ", "")
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text, count=1)
    return text.replace("<svg ", '<svg role="img" ', 1)
