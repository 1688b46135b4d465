"""Plots of runs: one palette that colour-blind readers can tell apart, as PNG, PDF and SVG.

Every function returns a matplotlib ``Figure`` of its own; nothing touches pyplot's global state. Names come
from people and data: they are drawn as they are, whatever they hold, and the figure grows with them.
"""

from __future__ import annotations

import functools
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np

from fedllm.extras import require
from fedllm.measures import measure
from fedllm.runs.durable import replace_file
from fedllm.runs.records import RoundRecord
from fedllm.runs.summary import SIMULATED, simulated_seconds
from fedllm.wording import human_bytes, human_seconds
from simulations.results.intervals import by_seed, counted, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AXES",
    "PALETTE",
    "axes_of",
    "canvas",
    "curves",
    "legend",
    "look",
    "partition",
    "progress",
    "repeated",
    "save",
    "scale_bytes",
    "styled",
    "svg",
    "traffic",
]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Okabe and Ito's colours, with yellow and black replaced by two that show on white and on black."""

_MARKERS = "osD^vP*X"
_DASHES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT = 4.6, 3.1
_LINE = 64
"""Characters of the smallest text that fit the width beside a legend's handle."""
_INK = "#2b2f36"
_GRID = "#c9cdd3"

Arguments = ParamSpec("Arguments")
Against = Literal["round", "bytes", "seconds", "simulated", "passes"]
AXES: tuple[Against, ...] = ("round", "bytes", "seconds")

_LABELS = {
    "bytes": "sent, both directions",
    "simulated": "simulated time",
    "passes": "forward passes of clients, a backward pass counted as two",
}

_STYLE: Any = {
    "font.size": 11,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "fedllm",
    "pdf.fonttype": 42,
    "text.parse_math": False,
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


@contextmanager
def _style() -> Iterator[None]:
    """Draw in this module's style; a letter that the font lacks is a box."""
    require("matplotlib", "a plot")
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw in this module's style; matplotlib is imported only when something is drawn."""

    @functools.wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return wrapper


def canvas() -> tuple[Figure, Axes]:
    """Return an empty figure of the usual size, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def progress(rounds: Sequence[RoundRecord], metric: str, against: Against) -> tuple[list[float], list[float]]:
    """Return where a run stood whenever it was evaluated, from its starting point on: x and y.

    Args:
        rounds: ascending; what came before a round counts towards its bytes and seconds.
        metric: name of a metric; rounds without it are passed over.
        against: ``round``, ``bytes`` (both directions), ``seconds``, ``simulated`` (seconds of devices), or
            ``passes``: batches through the whole model, those of a backward pass counted twice.
    """
    moved = np.cumsum([r.bytes_up + r.bytes_down for r in rounds])
    places = {
        "round": [r.round for r in rounds],
        "bytes": moved.tolist(),
        "seconds": np.cumsum([r.seconds for r in rounds]).tolist(),
        "simulated": np.cumsum([r.details.get(SIMULATED, 0.0) for r in rounds]).tolist(),
        "passes": np.cumsum([r.forward + 2 * r.backward for r in rounds]).tolist(),
    }
    place = places[against]
    found = [(x, r.metrics[metric]) for x, r in zip(place, rounds, strict=True) if metric in r.metrics]
    return [float(x) for x, _ in found], [float(y) for _, y in found]


def axes_of(runs: Iterable[Sequence[RoundRecord]]) -> tuple[Against, ...]:
    """Return what metrics of these runs are drawn against: simulated time where all have simulated it."""
    simulated = all(simulated_seconds(rounds) is not None for rounds in runs)
    return (*AXES, "simulated") if simulated else AXES


def look(index: int) -> dict[str, Any]:
    """Return colour and dashes, of which no two among 32 series have the same."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": _DASHES[index // len(PALETTE) % len(_DASHES)],
    }


@styled
def curves(runs: Mapping[str, Sequence[RoundRecord]], metric: str, against: Against = "round") -> Figure:
    """Draw a metric of one run or several; each run has its colour, its dashes and its marker."""
    figure, axes = canvas()
    for index, rounds in enumerate(runs.values()):
        x, y = progress(rounds, metric, against)
        marker = _MARKERS[index % len(_MARKERS)] if len(x) <= 40 else None
        axes.plot(x, y, **look(index), marker=marker)
    _finish(axes, against, f"test {measure(metric).title}")
    if len(runs) > 1:
        legend(figure, axes.get_lines(), list(runs))
    return figure


@styled
def repeated(
    groups: Mapping[str, Sequence[tuple[int, Sequence[RoundRecord]]]],
    metric: str,
    against: Against = "round",
) -> Figure:
    """Draw the mean over seeds of each group and, from three seeds on, its 95 % interval as a band.

    The last point of a band is the interval that a comparison states. A mean is drawn where every run of the
    group was evaluated.

    Args:
        groups: runs by name, each as its seed and its rounds.
        metric: name of a metric.
        against: what the metric is drawn against.
    """
    figure, axes = canvas()
    for index, runs in enumerate(groups.values()):
        paths = [(seed, *progress(rounds, metric, against)) for seed, rounds in runs]
        length = min(len(y) for _, _, y in paths)
        x = np.mean([x[:length] for _, x, _ in paths], axis=0)
        spread = [
            interval(list(by_seed((seed, y[place]) for seed, _, y in paths).values()))
            for place in range(length)
        ]
        own = look(index)
        axes.plot(x, [one.mean for one in spread], **own)
        if spread and spread[0].means_something:
            low, high = np.array([(one.low, one.high) for one in spread], dtype=float).T
            axes.fill_between(x, low, high, color=own["color"], alpha=0.18, linewidth=0)
    _finish(axes, against, f"test {measure(metric).title}")
    names = [f"{label} ({counted([seed for seed, _ in runs])})" for label, runs in groups.items()]
    legend(figure, axes.get_lines(), names)
    return figure


@styled
def traffic(rounds: Sequence[RoundRecord]) -> Figure:
    """Draw the bytes of each round, upload and download side by side."""
    figure, axes = canvas()
    numbers = np.array([r.round for r in rounds])
    up, down = np.array([r.bytes_up for r in rounds]), np.array([r.bytes_down for r in rounds])
    handles: list[Any] = []
    if len(rounds) <= 60:
        handles += [axes.bar(numbers - 0.2, up, 0.38, color=PALETTE[0])]
        handles += [axes.bar(numbers + 0.2, down, 0.38, color=PALETTE[1])]
    else:
        handles += axes.step(numbers, up, where="mid", color=PALETTE[0])
        handles += axes.step(numbers, down, where="mid", color=PALETTE[1], linestyle="--")
    _finish(axes, "round", "bytes per round")
    scale_bytes(axes, "y", np.concatenate([up, down]))
    legend(figure, handles, ["up", "down"])
    return figure


@styled
def partition(description: Mapping[str, Any]) -> Figure:
    """Draw how many texts of each class each client holds, from ``partition.json``."""
    clients, names = list(description["clients"]), list(description["label_names"])
    figure, axes = canvas()
    many = len(clients) > 60
    if many:
        clients.sort(key=lambda client: -client["examples"])
    rows, names = _strata(clients, names)
    places = np.arange(len(clients)) if many else np.array([client["node"] for client in clients])
    floor = np.zeros(len(clients))
    bars = []
    for index, row in enumerate(rows):
        look: dict[str, Any] = {"color": PALETTE[index], "bottom": floor, "linewidth": 0}
        bars.append(axes.bar(places, row, 1.0 if many else 0.8, **look))
        floor = floor + row
    axes.grid(visible=False, axis="x")
    _finish(axes, "clients, largest first" if many else "client", "training texts")
    if any(names):
        legend(figure, bars, names)
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


def _finish(axes: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(_LABELS.get(x, x))
    axes.set_ylabel(y)
    if x in ("round", "client"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if x == "simulated":
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: human_seconds(value))
    if x == "bytes":
        scale_bytes(axes, "x", np.concatenate([line.get_xdata() for line in axes.get_lines()] or [[]]))


def scale_bytes(axes: Axes, which: Literal["x", "y"], values: np.ndarray[Any, Any]) -> None:
    """Write bytes as people do, on a logarithmic axis where they differ by more than ten times."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    positive = values[values > 0]
    wide = positive.size > 0 and positive.max() > 10 * positive.min()
    if wide:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        decades = np.log10(positive.max() / positive.min())
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=8))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    if which == "y" and not wide:
        axes.set_ylim(0, 1.05 * max(values.max(initial=0), 1))


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Write the names above the axes, in as many columns as fit; the figure grows by what they take."""
    lines = [_lines(name) for name in names]
    longest = max(len(line) for name in lines for line in name)
    columns = min(3, len(names), max(1, (_LINE + 8) // (longest + 8)))
    drawn = figure.legend(
        handles,
        [f"series {index}" for index in range(len(names))],  # a name that begins with _ would be left out
        loc="outside upper center",
        ncols=columns,
        handlelength=2.6,
        fontsize=10 if longest <= 40 else 8,
    )
    for text, name in zip(drawn.get_texts(), lines, strict=True):
        text.set_text("\n".join(name))
    taken = drawn.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    figure.set_size_inches(max(_WIDTH, taken.width / figure.dpi + 0.2), _HEIGHT + taken.height / figure.dpi)


def _lines(name: str) -> list[str]:
    """Break a name into lines that fit; what cannot be drawn, such as half a character, is replaced."""
    drawable = name.encode("utf-8", "replace").decode()
    drawable = "".join(letter if letter.isprintable() else " " for letter in drawable)
    return textwrap.wrap(drawable, _LINE) or [" "]


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG of 160 dots per inch on white, and a PDF and an SVG beside it.

    Returns:
        ``path``, the PNG.
    """
    replace_file(path, _drawn(figure, "png"))
    replace_file(path.with_suffix(".pdf"), _drawn(figure, "pdf"))
    replace_file(path.with_suffix(".svg"), _drawn(figure, "svg"))
    return path


_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


def _drawn(figure: Figure, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format=form, metadata=_METADATA[form], dpi=160, **options)
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """Return an SVG element for an HTML page that follows the page's text colour and font.

    Args:
        figure: what to draw.
        name: unique within the page; its ids begin with it.
    """
    text = _drawn(figure, "svg", transparent=True).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id=")|(href="#)|(url\(#)', lambda match: f"{match[0]}{name}-", text)
    # Page variables where the page has them; colours of bars stay, lines need more light on dark paper.
    text = text.replace(_INK, "currentColor").replace(_GRID, f"var(--line, {_GRID})")
    text = text.replace(PALETTE[0], f"var(--accent, {PALETTE[0]})").replace("'DejaVu Sans', ", "")
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text, count=1)
    return text.replace("<svg ", '<svg role="img" ', 1)
