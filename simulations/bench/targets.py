"""Every figure that the project has set itself a goal for, measured, beside that goal."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from fedllm.errors import ConfigError, FedllmError
from fedllm.runs.durable import replace_file, to_json
from fedllm.wording import number

__all__ = ["BENCHES", "TARGETS", "Outcome", "Target", "judge"]


@dataclass(frozen=True)
class Target:
    """A goal for one number of a benchmark.

    Attributes:
        what: the figure, with its unit.
        bench: module of :mod:`simulations.bench` whose ``run`` measures it.
        place: keys that lead to it in what that returns.
        bound: ``most`` where a smaller number is better, ``least`` where a larger one is.
        goal: the number to be reached, in the figure's unit.
        per: what the benchmark's number is divided by to come to that unit.
    """

    what: str
    bench: str
    place: tuple[str, ...]
    bound: Literal["most", "least"]
    goal: float
    per: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a target stands.

    Attributes:
        what: as the target has it.
        bench: likewise.
        value: what was measured; None where nothing was.
        goal: in words, such as ``at most 0.5``.
        verdict: ``met``, ``missed by 12 %`` of the goal, or ``not measured: ...``.
        measured_at: UTC, to the second.
    """

    what: str
    bench: str
    value: float | None
    goal: str
    verdict: str
    measured_at: str | None


def _targets() -> tuple[Target, ...]:
    written = tomllib.loads((Path(__file__).parent / "targets.toml").read_text(encoding="utf-8"))
    found = []
    for bench, rows in written.items():
        for row in rows:
            (bound,) = row.keys() & {"most", "least"}
            per = float(row.get("per", 1.0))
            found.append(Target(row["what"], bench, tuple(row["place"]), bound, float(row[bound]), per))
    return tuple(found)


TARGETS = _targets()
"""Goals for accuracy and bytes are judged by ``fedllm reproduce``, which runs the experiments."""
BENCHES = tuple(dict.fromkeys(target.bench for target in TARGETS))


def judge(
    out: Path,
    only: Sequence[str] = (),
    *,
    fresh: bool = False,
    report: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, Any]]:
    """Run the benchmarks that targets are about, and judge every target; hours on two cores.

    Args:
        out: folder that keeps what each benchmark returned, so that one that was cut short goes on: what lies
            there is not measured again.
        only: names of benchmarks; all where there are none.
        fresh: measure again what lies there.
        report: receives a sentence for each benchmark.

    Returns:
        An :class:`Outcome` for each target, as dictionaries.

    Raises:
        ConfigError: ``only`` names what is no such benchmark.
    """
    if unknown := sorted(set(only) - set(BENCHES)):
        raise ConfigError(f"no target is about {unknown[0]!r}; there are {', '.join(BENCHES)}")
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for bench in BENCHES:
        if not only or bench in only:
            found[bench] = _measured(bench, out / f"{bench}.json", fresh, report)
    return [asdict(_judged(target, found[target.bench])) for target in TARGETS if target.bench in found]


def _measured(bench: str, kept: Path, fresh: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Return ``result`` or ``failed``, and when that was; a failure is not kept."""
    if kept.exists() and not fresh:
        found: dict[str, Any] = json.loads(kept.read_bytes())
        report(f"{bench}: measured at {found['measured_at']}, in {kept}")
        return found
    report(f"{bench}: measuring")
    began = time.monotonic()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        result = import_module(f"simulations.bench.{bench}").run()
    except (FedllmError, OSError, RuntimeError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        report(f"{bench}: {reason}")
        return {"failed": reason, "measured_at": at}
    found = {"result": json.loads(to_json(result)), "measured_at": at}
    replace_file(kept, to_json(found, indent=2))
    report(f"{bench}: took {time.monotonic() - began:.0f} s")
    return found


def _judged(target: Target, found: dict[str, Any]) -> Outcome:
    goal = f"at {target.bound} {number(target.goal)}"
    if "failed" in found:
        return Outcome(target.what, target.bench, None, goal, f"not measured: {found['failed']}", None)
    value: Any = found["result"]
    for key in target.place:
        if not isinstance(value, dict) or key not in value:
            missing = f"not measured: {target.bench} printed no {' / '.join(target.place)} here"
            return Outcome(target.what, target.bench, None, goal, missing, found["measured_at"])
        value = value[key]
    value = float(value) / target.per
    short = value - target.goal if target.bound == "most" else target.goal - value
    verdict = "met" if short <= 0 else f"missed by {short / target.goal:.0%} of the goal"
    return Outcome(target.what, target.bench, value, goal, verdict, found["measured_at"])
