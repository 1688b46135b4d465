"""``fedllm bench attacks``: what three bad clients of ten do to a run, under each way of averaging.

A short run in the shape of ``quickstart``: LoRA of rank 8 on MiniLM, ten clients with skewed classes of BBC
news, of whom the seed draws three. All bounds of the server are as they are by default, so that what an
average lets pass has passed the gates first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.presets import document
from fedllm.runs.reader import Run
from simulations import running
from simulations.running import Host
from strategies.registry import resolve_run

__all__ = ["ATTACKS", "DEFENCES", "run"]

SHARE = 0.3
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "sign_flip": {"kind": "sign_flip", "factor": 4.0, "share": SHARE},
    "scale": {"kind": "scale", "factor": 8.0, "share": SHARE},
    "label_flip": {"kind": "label_flip", "factor": 2.0, "share": SHARE},
    "backdoor": {"kind": "backdoor", "factor": 3.0, "share": SHARE},
    "garbage": {"kind": "garbage", "factor": 4.0, "share": SHARE},
}
"""Settings of ``[attack]``, by what the table calls them; ``none`` is honest."""
DEFENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "norm_bound": {"robust": "norm_bound"},
    "trimmed_mean": {"robust": "trimmed_mean", "byzantine": SHARE},
    "median": {"robust": "median"},
    "multi_krum": {"robust": "multi_krum", "byzantine": SHARE},
}
"""Settings of ``[server]``."""


def run(rounds: int = 3, attacks: Sequence[str] = (*ATTACKS,)) -> dict[str, Any]:
    """Run every attack against every defence, one after another.

    Args:
        rounds: of each run.
        attacks: names of :data:`ATTACKS`.

    Returns:
        ``accuracy``, and for ``backdoor`` the ``backdoor_success``, by attack and defence, after the last
        round; a fifth of the articles, 445, is held out.
    """
    return {attack: {defence: _cell(attack, defence, rounds) for defence in DEFENCES} for attack in attacks}


def _cell(attack: str, defence: str, rounds: int) -> dict[str, float]:
    """Run one attack against one defence."""
    given: dict[str, Any] = {
        "rounds": rounds,
        "data.max_length": 32,
        "training.batch_size": 8,
        "evaluation.every": rounds,
        **{f"attack.{key}": value for key, value in ATTACKS[attack].items()},
        **{f"server.{key}": value for key, value in DEFENCES[defence].items()},
    }
    config = resolve_run(document("quickstart"), [(key.split("."), value) for key, value in given.items()])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        running.run(config, folder, Host("loopback", 1, 1), None)
        metrics = Run(folder).rounds()[-1].metrics
    return {name: metrics[name] for name in ("accuracy", "backdoor_success") if name in metrics}
