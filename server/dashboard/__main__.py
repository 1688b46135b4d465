"""``python -m server.dashboard RUNS``: the dashboard as a child of another command."""

from __future__ import annotations

from fedllm.processes import die_with_parent
from server.dashboard.commands import app

if __name__ == "__main__":
    die_with_parent()
    app(prog_name="fedllm dashboard")
