"""What a budget costs: accuracy after short runs, by what is trained, how many clients there are, epsilon.

Whole runs, of the model and texts of ``quickstart``. To be short, texts have 16 tokens and batches 8 of them;
texts are shared out evenly, and clients hidden whole (``privacy.unit = "client"``). Without a budget updates
are clipped all the same, so that what is compared is the noise alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig
from fedllm.presets import document
from fedllm.runs.reader import Run
from simulations.engines.loopback import simulate
from strategies.registry import resolve_run

__all__ = ["BUDGETS", "COHORTS", "ROWS", "compare", "run"]

BUDGETS = (math.inf, 8.0, 3.0, 1.0)
COHORTS = {10: 10, 100: 20, 1000: 100}
"""Clients that a round has on average, by how many there are."""
ROWS: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "quickstart at 4 bits": ("codec.up=rotate | quantize(bits=4)",),
    "head": ("tuning.peft=head", "tuning.targets=[]", "training.learning_rate=3e-2"),
}
"""What is trained and how it travels: 75,653 values, the same in an eighth of the bytes, 1,925 values."""
_SHORT = (
    "data.max_length=16", "data.partition=iid", "training.batch_size=8", "rounds=4", "evaluation.every=4",
    "privacy.clip=1.0",
)  # fmt: skip


def run(
    rows: Sequence[str] = (*ROWS,),
    clients: Sequence[int] = (10, 100),
    budgets: Sequence[float] = BUDGETS,
) -> dict[str, Any]:
    """Train under each budget: some twenty minutes on a shared core. A thousand clients take longer."""
    return {
        row: {f"{count} clients": compare(config_of(row, count), budgets) for count in clients}
        for row in rows
    }


def config_of(row: str, clients: int) -> RunConfig:
    """Return a run of a row of the table, without a budget yet."""
    many = (f"clients={clients}", f"server.sample={COHORTS[clients]}")
    return resolve_run(document("quickstart"), [*_SHORT, *many, *ROWS[row]])


def compare(config: RunConfig, budgets: Sequence[float]) -> dict[str, Mapping[str, float]]:
    """Train anew under each budget; return noise, what was spent and accuracy, by epsilon.

    Args:
        config: of a run with ``privacy.clip`` whose method is private.
        budgets: values of epsilon; infinity adds no noise.
    """
    return {f"epsilon {budget:g}": _cell(config, budget) for budget in budgets}


def _cell(config: RunConfig, budget: float) -> Mapping[str, float]:
    if math.isfinite(budget):
        config = resolve_run(config.to_document(), [f"privacy.target_epsilon={budget:g}"])
    with tempfile.TemporaryDirectory() as folder:
        simulate(config, Path(folder) / "run")
        summary = Run(Path(folder) / "run").summary
    return {
        "noise_multiplier": config.privacy.noise_multiplier or 0.0,
        "spent": summary["privacy"]["epsilon"] or 0.0,
        "accuracy": summary["metrics"]["accuracy"],
    }
