"""``python -m server.dashboard RUNS``: the dashboard as a child of another command."""

from __future__ import annotations

from server.dashboard.commands import app

if __name__ == "__main__":
    app(prog_name="fedllm dashboard")
