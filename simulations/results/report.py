"""``report.html``: a run on one page that needs nothing else, light or dark; plots as PNG beside it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedllm.measures import in_order, measure
from fedllm.protocol.wire import SESSION
from fedllm.runs.durable import disk_errors, replace_file
from fedllm.runs.reader import Run
from fedllm.runs.records import NodeRound, RoundRecord
from fedllm.runs.summary import SIMULATED, best_of, own_scores, simulated_seconds
from fedllm.tasks.metrics import neglect
from fedllm.wording import human_bytes, human_seconds, number, saved
from simulations.results import plots

if TYPE_CHECKING:
    import jinja2
    from matplotlib.figure import Figure

__all__ = ["environment", "render", "write"]

_TITLES = {"round": "by round", "bytes": "by bytes", "seconds": "by time", "simulated": "by simulated time"}
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


def environment() -> jinja2.Environment:
    """Return what fills the templates of this package: whatever it is given is escaped."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("simulations.results", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"bytes": human_bytes, "seconds": human_seconds, "number": number, "saved": saved}
    return made


def render(run: Run, figures: Mapping[str, tuple[str, Figure]]) -> str:
    """Return the page; whatever came from data, configuration or clients is escaped."""
    from markupsafe import Markup

    rounds = run.rounds()
    nodes = run.nodes()
    events = run.newest_events()
    evaluated = next((record for record in reversed(rounds) if "classes" in record.details), None)
    classes = evaluated.details["classes"].values() if evaluated else ()
    more = [part for part in ("precision", "f1") if any(part in one for one in classes)]
    lost = [row for row in nodes if row.status not in ("accepted", "unused")]
    template = environment().get_template("report.html")
    return template.render(
        summary=run.summary,
        status=run.status,
        config=run.config,
        toml=run.config.to_toml(),
        provenance=run.provenance,
        rounds=rounds,
        metrics=_metrics(run),
        measure=measure,
        best=run.best,
        reached=_reached(rounds, run.config.metric),
        evaluated=evaluated,
        more=more,
        counted="entities" if more else "texts",
        missed=neglect(evaluated.metrics, evaluated.details["classes"]) if evaluated else None,
        figures=[(title, Markup(plots.svg(figure, name))) for name, (title, figure) in figures.items()],
        partition=run.partition,
        clients=(clients := _clients(run, nodes)),
        scores=in_order({name for row in clients for name in row["scores"]}, run.config.metric),
        traffic=run.traffic(("direction", "exchange", "record")),
        codec=_codec(rounds),
        simulated=SIMULATED,
        lost=lost[:_REASONS_SHOWN],
        lost_total=len(lost),
        reasons=Counter(row.reason or row.status for row in lost).most_common(10),
        events=[event for event in events if event.kind not in ("finished", "stopped")][-50:],
        verdict=next((e.message for e in reversed(events) if e.kind == run.status), None),
    )


def _metrics(run: Run) -> list[str]:
    """Return the metrics that the run measured, the one that decides first."""
    return in_order({name for record in run.rounds() for name in record.metrics}, run.config.metric)


def _reached(rounds: Sequence[RoundRecord], metric: str) -> str:
    """Say when devices had brought the metric that decides to its best; empty where none were simulated."""
    best = best_of(((record.round, record.metrics) for record in rounds), metric)
    seconds = simulated_seconds([record for record in rounds if best and record.round <= best.round])
    return (
        ""
        if best is None or seconds is None
        else f"best {measure(metric).title} after {human_seconds(seconds)}"
    )


def _figures(run: Run) -> dict[str, tuple[str, Figure]]:
    """Return title and figure by name, in the page's order."""
    rounds, metrics = run.rounds(), _metrics(run)
    figures: dict[str, tuple[str, Figure]] = {}
    for against in plots.axes_of([rounds]):
        for metric in metrics[:1]:
            title = f"{measure(metric).headline} {_TITLES[against]}"
            figures[f"{metric}-{against}"] = (title, plots.curves({run.config.name: rounds}, metric, against))
    if len(metrics) > 1:
        figure = plots.curves({run.config.name: rounds}, metrics[-1], "round")
        figures[f"{metrics[-1]}-round"] = (f"{measure(metrics[-1]).headline} by round", figure)
    if rounds:
        figures["traffic"] = ("Traffic", plots.traffic(rounds))
    if run.partition.get("clients"):
        figures["partition"] = ("Who holds which texts", plots.partition(run.partition))
    return figures


def _codec(rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
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
    asked = sorted(rows.keys() | moved.keys())
    worked = {node: [row for row in rows[node] if row.exchange not in SESSION] for node in asked}
    trained = {node: [row for row in worked[node] if row.exchange != "evaluate"] for node in asked}
    scored = {row.node: row for row in nodes if row.exchange == "evaluate" and row.status == "accepted"}
    return [
        {
            "node": node,
            "statuses": Counter(row.status for row in rows[node]),
            "examples": sum(row.examples for row in trained[node] if row.status == "accepted"),
            "loss": next((row.loss for row in reversed(trained[node]) if row.loss is not None), None),
            "scores": own_scores(scored[node], run.config.metric) if node in scored else {},
            "compute_seconds": fmean(row.compute_seconds for row in worked[node]) if worked[node] else None,
            "peak_rss_bytes": max((row.peak_rss_bytes for row in rows[node]), default=0),
            "up": moved[node].get("up", 0),
            "down": moved[node].get("down", 0),
        }
        for node in asked
    ]
