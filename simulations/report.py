"""``report.html``: a run on one page that needs nothing else, light or dark; plots as PNG beside it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedllm.durable import disk_errors, replace_file
from fedllm.runs import NodeRound, Round, Run
from fedllm.wording import human_bytes, human_seconds, number
from simulations import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["render", "write"]

_TITLES = {"round": "by round", "bytes": "by bytes", "seconds": "by time"}
_REASONS_SHOWN = 200


def write(run_dir: Path) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a run folder and return the page's path.

    Raises:
        StoreError: the folder holds no run, or cannot be written.
    """
    run = Run(run_dir)
    figures = _figures(run)
    with disk_errors(run_dir):
        (run_dir / "plots").mkdir(exist_ok=True)
    for name, (_, figure) in figures.items():
        plots.save(figure, run_dir / "plots" / f"{name}.png")
    page = run_dir / "report.html"
    replace_file(page, render(run, figures))
    return page


def render(run: Run, figures: Mapping[str, tuple[str, Figure]]) -> str:
    """Return the page; whatever came from data, configuration or clients is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("simulations", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "seconds": human_seconds, "number": number, "less": _less}
    rounds = run.rounds()
    nodes = run.nodes()
    events = run.newest_events()
    lost = [row for row in nodes if row.status not in ("accepted", "unused")]
    return environment.get_template("report.html").render(
        summary=run.summary,
        status=run.status,
        config=run.config,
        toml=run.config.to_toml(),
        provenance=run.provenance,
        rounds=rounds,
        metrics=_metrics(run),
        figures=[(title, Markup(plots.svg(figure, name))) for name, (title, figure) in figures.items()],
        partition=run.partition,
        clients=_clients(run, nodes),
        traffic=run.traffic(("direction", "exchange", "record")),
        codec=_codec(rounds),
        lost=lost[:_REASONS_SHOWN],
        lost_total=len(lost),
        reasons=Counter(row.reason or row.status for row in lost).most_common(10),
        events=[event for event in events if event.kind not in ("finished", "stopped")][-50:],
        verdict=next((e.message for e in reversed(events) if e.kind == run.status), None),
    )


def _metrics(run: Run) -> list[str]:
    """Return the metrics that the run measured, the one people ask for first."""
    seen = {name for record in run.rounds() for name in record.metrics}
    first = [name for name in ("accuracy", "perplexity", "loss") if name in seen]
    return first + sorted(seen - set(first))


def _figures(run: Run) -> dict[str, tuple[str, Figure]]:
    """Return title and figure by name, in the page's order."""
    rounds, metrics = run.rounds(), _metrics(run)
    figures: dict[str, tuple[str, Figure]] = {}
    for against in plots.AXES:
        for metric in metrics[:1]:
            title = f"{metric.capitalize()} {_TITLES[against]}"
            figures[f"{metric}-{against}"] = (title, plots.curves({run.config.name: rounds}, metric, against))
    if len(metrics) > 1:
        figure = plots.curves({run.config.name: rounds}, metrics[-1], "round")
        figures[f"{metrics[-1]}-round"] = (f"{metrics[-1].capitalize()} by round", figure)
    if rounds:
        figures["traffic"] = ("Traffic", plots.traffic(rounds))
    if run.partition.get("clients"):
        figures["partition"] = ("Who holds which texts", plots.partition(run.partition))
    return figures


def _codec(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Return what the codecs did, by direction: bytes by part of the payload, and the mean relative error."""
    rows = []
    for direction in ("up", "down"):
        parts: Counter[str] = Counter()
        for record in rounds:
            parts.update(record.details.get("codec", {}).get(direction, {}))
        errors = [e for record in rounds if (e := record.details.get(f"error_{direction}")) is not None]
        if errors:
            rows.append({"direction": direction, "parts": parts.most_common(), "error": fmean(errors)})
    return rows


def _clients(run: Run, nodes: Sequence[NodeRound]) -> list[dict[str, Any]]:
    """Return one row per client that was ever asked."""
    rows: dict[int, list[NodeRound]] = defaultdict(list)
    for row in nodes:
        rows[row.node].append(row)
    moved: dict[int, dict[str, int]] = defaultdict(dict)
    for group in run.traffic(("node", "direction")):
        moved[group["node"]][group["direction"]] = group["bytes"]
    return [
        {
            "node": node,
            "statuses": Counter(row.status for row in rows[node]),
            "examples": sum(row.examples for row in rows[node] if row.status == "accepted"),
            "loss": next((row.loss for row in reversed(rows[node]) if row.loss is not None), None),
            "compute_seconds": fmean(row.compute_seconds for row in rows[node]) if rows[node] else None,
            "peak_rss_bytes": max((row.peak_rss_bytes for row in rows[node]), default=0),
            "up": moved[node].get("up", 0),
            "down": moved[node].get("down", 0),
        }
        for node in sorted(rows.keys() | moved.keys())
    ]


def _less(count: int, dense: int) -> str:
    """Say how many times fewer bytes than dense these are."""
    if not count:
        return ""
    return f"{dense / count:.3g}x less than dense fp32" if dense > 1.005 * count else "as dense fp32"
