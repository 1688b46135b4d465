"""The operator's dashboard: a process of its own beside the runs, which it reads and never waits for.

access.py    who may enter: users, API tokens, sessions, and a limit on guessing
gate.py      the one place that lets a request in, or does not
index.py     the folder of runs as the dashboard sees it, read again only where something changed
totals.py    a run's clients, summed up
verdict.py   is it running well, who is slow, what did it cost
launch.py    runs as processes of their own: start, go on, roll back, clone
ops.py      what a person does, checked and audited; pages and API both act through it
api.py       the same as JSON, described by OpenAPI
metrics.py   the same for Prometheus
pages/       the same for people (NiceGUI)
"""

from __future__ import annotations

from fedllm.extras import require

__all__ = ["require_installed"]


def require_installed() -> None:
    """Raise ``ConfigError`` where the dashboard's own packages are missing."""
    require("nicegui", "the dashboard")
